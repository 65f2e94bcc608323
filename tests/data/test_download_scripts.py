"""The download scripts, with small archives in place of the real ones."""

import hashlib
import io
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
            with zipfile.ZipFile(archive, "w") as file:
                for name, content in members.items():
                    file.writestr(name, content)
            value = str(archive.stat().st_size)
        else:
            with tarfile.open(archive, "w") as file:
                for name, content in members.items():
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    file.addfile(entry, io.BytesIO(content.encode()))
            value = hashlib.md5(archive.read_bytes()).hexdigest()
        self.text, count = re.subn(rf"(get {re.escape(path)}) [0-9a-f]+", rf"\1 {value}", self.text)
        assert count == 1, f"the script does not download {path}"

    def run(self, expect=0):
        self.script.write_text(self.text)
        command = ["bash", str(self.script), str(self.target)]
        environment = {**os.environ, self.variable: f"file://{self.server}"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == expect, done.stderr
        return done

    def files(self):
        files = [path for path in self.target.rglob("*") if path.is_file()]
        return sorted(str(p.relative_to(self.target)) for p in files if not p.name.startswith("."))


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
    annotations = {f"annotations/{name}.json": "{}" for name in names}
    download.serve("annotations/annotations_trainval2017.zip", annotations)
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


@pytest.mark.parametrize("name, files", [("coco", COCO_FILES), ("voc", VOC_FILES)])
def test_files_are_where_detectron2_wants_them(request, name, files):
    """What is complete is not downloaded again."""
    download = request.getfixturevalue(name)
    download.run()
    assert download.files() == files
    shutil.rmtree(download.server)
    assert download.run().stdout.count("is complete") == 3


def test_stopped_download_goes_on_where_it_stopped(coco):
    archive, folder = coco.server / "zips" / "train2017.zip", coco.target / "coco"
    content = archive.read_bytes()
    archive.write_bytes(content[:60])
    assert f"has 60 bytes, expected {len(content)}" in coco.run(expect=1).stderr
    assert not (folder / "train2017").exists()
    archive.write_bytes(b"x" * 60 + content[60:])  # damaged, if it were downloaded from its beginning
    coco.run()
    assert coco.files() == COCO_FILES


def test_archive_that_is_damaged_or_missing(coco):
    archive, partial = coco.server / "zips" / "val2017.zip", coco.target / "coco" / "val2017.zip"
    archive.write_bytes(b"x" * archive.stat().st_size)
    for _ in range(2):
        assert "is damaged" in coco.run(expect=1).stderr
    archive.unlink()
    partial.unlink()
    assert "zips/val2017.zip stopped" in coco.run(expect=1).stderr


def test_wrong_sum_is_not_unpacked(voc):
    archive = voc.server / "voc2012" / "VOCtrainval_11-May-2012.tar"
    archive.write_bytes(archive.read_bytes() + b"more")
    assert "VOCtrainval_11-May-2012.tar' has the md5 sum" in voc.run(expect=1).stderr
    assert not (voc.target / "VOC2012").exists()
