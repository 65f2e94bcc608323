"""The download scripts, with small archives in place of the real ones."""

import hashlib
import os
import re
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "datasets"

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("bash", "curl", "unzip", "tar"))),
    reason="needs bash, curl, unzip and tar",
)


class Download:
    """A download script whose server is a folder, and whose sizes or sums are those of its files."""

    def __init__(self, folder, script, variable):
        self.server, self.target, self.variable = folder / "server", folder / "my data", variable
        self.text = (SCRIPTS / script).read_text()
        self.script = folder / script

    def serve(self, path, members):
        """Put an archive of {name: content} on the server; the script expects it from now on."""
        archive = self.server / path
        archive.parent.mkdir(parents=True, exist_ok=True)
        if archive.suffix == ".zip":
            self._zip(archive, members)
            value = str(archive.stat().st_size)
        else:
            self._tar(archive, members)
            value = hashlib.md5(archive.read_bytes()).hexdigest()
        self.text, count = re.subn(rf"(get {re.escape(path)}) [0-9a-f]+", rf"\1 {value}", self.text)
        assert count == 1, f"the script does not download {path}"
        return archive

    @staticmethod
    def _zip(archive, members):
        with zipfile.ZipFile(archive, "w") as file:
            for name, content in members.items():
                file.writestr(name, content)

    @staticmethod
    def _tar(archive, members):
        folder = archive.with_suffix("")
        for name, content in members.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)
        with tarfile.open(archive, "w") as file:
            file.add(folder / "VOCdevkit", "VOCdevkit")

    def run(self):
        self.script.write_text(self.text)
        return subprocess.run(
            ["bash", str(self.script), str(self.target)],
            env={**os.environ, self.variable: f"file://{self.server}"},
            capture_output=True,
            text=True,
        )

    def files(self):
        return sorted(
            str(path.relative_to(self.target))
            for path in self.target.rglob("*")
            if path.is_file() and not path.name.startswith(".")
        )


COCO_FILES = [
    "coco/annotations/instances_train2017.json",
    "coco/annotations/instances_val2017.json",
    "coco/train2017/2.jpg",
    "coco/val2017/1.jpg",
]
VOC_FILES = [
    "VOC2007/JPEGImages/1.jpg",
    "VOC2007/JPEGImages/2.jpg",
    "VOC2012/JPEGImages/3.jpg",
]


@pytest.fixture
def coco(tmp_path):
    download = Download(tmp_path, "download_coco_2017.sh", "COCO_URL")
    names = ("instances_train2017", "instances_val2017", "captions_val2017")
    download.serve(
        "annotations/annotations_trainval2017.zip", {f"annotations/{name}.json": "{}" for name in names}
    )
    download.serve("zips/val2017.zip", {"val2017/1.jpg": "one" * 100})
    download.serve("zips/train2017.zip", {"train2017/2.jpg": "two" * 100})
    return download


@pytest.fixture
def voc(tmp_path):
    download = Download(tmp_path, "download_voc_2007_2012.sh", "VOC_URL")
    image = "VOCdevkit/VOC{}/JPEGImages/{}.jpg"
    download.serve("voc2007/VOCtrainval_06-Nov-2007.tar", {image.format(2007, 1): "one"})
    download.serve("voc2007/VOCtest_06-Nov-2007.tar", {image.format(2007, 2): "two"})
    download.serve("voc2012/VOCtrainval_11-May-2012.tar", {image.format(2012, 3): "three"})
    return download


def test_coco_skips_what_is_complete(coco):
    assert coco.run().returncode == 0
    assert coco.files() == COCO_FILES
    shutil.rmtree(coco.server)
    again = coco.run()
    assert again.returncode == 0 and again.stdout.count("is complete") == 3


def test_coco_goes_on_where_it_stopped(coco):
    archive = coco.server / "zips" / "val2017.zip"
    content = archive.read_bytes()
    partial = coco.target / "coco" / "val2017.zip"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(content[:50])
    archive.write_bytes(b"x" * 50 + content[50:])  # damaged, if it were downloaded from its beginning
    done = coco.run()
    assert done.returncode == 0, done.stderr
    assert coco.files() == COCO_FILES


def test_coco_stopped_download_is_kept_and_finished_by_the_next_run(coco):
    archive = coco.server / "zips" / "train2017.zip"
    content = archive.read_bytes()
    archive.write_bytes(content[:60])
    stopped = coco.run()
    assert stopped.returncode == 1
    assert f"has 60 bytes, expected {len(content)}" in stopped.stderr
    assert not (coco.target / "coco" / "train2017").exists()
    archive.write_bytes(content)
    assert coco.run().returncode == 0
    assert coco.files() == COCO_FILES


def test_coco_archive_that_is_damaged_or_missing(coco):
    archive = coco.server / "zips" / "val2017.zip"
    archive.write_bytes(b"x" * archive.stat().st_size)
    for _ in range(2):
        failed = coco.run()
        assert failed.returncode == 1 and "is damaged" in failed.stderr
    assert (coco.target / "coco" / "val2017.zip").exists()
    archive.unlink()
    (coco.target / "coco" / "val2017.zip").unlink()
    failed = coco.run()
    assert failed.returncode == 1 and "zips/val2017.zip stopped" in failed.stderr


def test_voc_is_as_detectron2_wants_it(voc):
    done = voc.run()
    assert done.returncode == 0, done.stderr
    assert voc.files() == VOC_FILES
    shutil.rmtree(voc.server)
    again = voc.run()
    assert again.returncode == 0 and again.stdout.count("is complete") == 3


def test_voc_wrong_sum_is_not_unpacked(voc):
    archive = voc.server / "voc2012" / "VOCtrainval_11-May-2012.tar"
    archive.write_bytes(archive.read_bytes() + b"more")
    failed = voc.run()
    assert failed.returncode == 1
    assert "VOCtrainval_11-May-2012.tar' has the md5 sum" in failed.stderr
    assert not (voc.target / "VOC2012").exists()
