"""Images without annotations: a folder of them."""

import itertools

import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import read_image
from PIL import Image
from small_datasets import assert_fails, load

from distill_d2.data.images import load_images

_numbers = itertools.count()


def write(path, width=60, height=40, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(0).randint(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def entry_of(folder, **changes):
    return {"NAME": f"images_{next(_numbers)}", "FORMAT": "images", "IMAGES": str(folder), **changes}


def test_folders_inside_it_count_in_order(tmp_path):
    names = ["b.png", "a/z.png", "a/b/c.png", "a/b.png", "c/a.png", "10.png", "9.png"]
    for index, name in enumerate(names):
        write(tmp_path / name, width=20 + index)
    expected = [
        {
            "file_name": str(tmp_path / name),
            "image_id": name,
            "annotations": [],
            "height": 40,
            "width": 20 + names.index(name),  # its own, though several threads read them
        }
        for name in sorted(names)
    ]
    assert load_images("unlabeled", str(tmp_path)) == expected


def test_what_counts_as_an_image(tmp_path, monkeypatch):
    """Files are not decoded for it, but for PNGs."""
    wanted = ["a.jpg", "b.JPEG", "d.bmp", "e.webp", "f.tif", "g.TIFF", "h.i.jpg"]
    for name in wanted:
        write(tmp_path / name)
    for name in ("notes.txt", "annotations.json", "jpg", "a.jpg.part", "x.xml"):
        (tmp_path / name).write_text("no image")
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    records = load_images("unlabeled", str(tmp_path))
    assert [record["image_id"] for record in records] == wanted
    for name in wanted:
        (tmp_path / name).unlink()
    with pytest.raises(ValueError) as caught:
        load_images("unlabeled", str(tmp_path))
    assert f"dataset 'unlabeled': '{tmp_path}' holds no images (.jpg, .jpeg, .png, " in str(caught.value)


@pytest.mark.parametrize(
    "orientation, ending", [(1, "jpg"), (3, "png"), (6, "jpg"), (8, "png"), (9, "jpg")]
)
def test_turned_photos_have_the_size_that_detectron2_reads(tmp_path, orientation, ending):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = write(tmp_path / f"photo.{ending}", exif=exif)
    (record,) = load_images("unlabeled", str(tmp_path))
    assert (record["height"], record["width"]) == read_image(str(path), "BGR").shape[:2]
    turned = orientation in (5, 6, 7, 8)
    assert (record["height"], record["width"]) == ((60, 40) if turned else (40, 60))


@pytest.mark.parametrize(
    "content, ending", [("nothing", ".jpg"), ("text", ".webp"), ("header", ".jpg"), ("header", ".png")]
)
def test_damaged_file_is_named(tmp_path, ending, content):
    write(tmp_path / "good.png")
    path = write(tmp_path / "inside" / f"bad{ending}")
    path.write_bytes({"nothing": b"", "text": b"no image", "header": path.read_bytes()[:10]}[content])
    with pytest.raises(ValueError, match=f"the image '{path}' cannot be used: "):
        load_images("unlabeled", str(tmp_path))


def test_png_that_is_damaged_further_on_is_named(tmp_path):
    """Pillow raises another kind of error for it; a PNG's orientation may come after its pixels."""
    path = write(tmp_path / "bad.png", width=300, height=300)
    parts = path.read_bytes().split(b"IDAT")
    assert len(parts) > 3
    path.write_bytes(b"IDAT".join(parts[:2]) + b"\0\1\2\3" + b"IDAT".join(parts[2:]))
    with pytest.raises(ValueError, match=f"the image '{path}' cannot be used: "):
        load_images("unlabeled", str(tmp_path))


# In DATASETS.CUSTOM.


def test_entry_by_a_relative_path(tmp_path):
    write(tmp_path / "datasets" / "pets" / "photos" / "a.png")
    entry = entry_of("pets/photos")
    (record,) = load(entry)
    assert record["file_name"] == str(tmp_path / "datasets/pets/photos/a.png")
    metadata = MetadataCatalog.get(entry["NAME"])
    assert metadata.get("evaluator_type") is None and metadata.get("thing_classes") is None


def test_wrong_entries(tmp_path):
    write(tmp_path / "a.png")
    keys = "a images dataset has ['FORMAT', 'IMAGES', 'NAME'], of which none may be left out"
    assert_fails(entry_of(tmp_path, JSON="a.json"), "unknown keys ['JSON']", keys)
    assert_fails({"NAME": "a", "FORMAT": "images"}, "missing keys ['IMAGES']", keys)
    assert_fails(entry_of(tmp_path, IMAGES=3), "IMAGES is 3", "expected a string")
    assert_fails(entry_of(tmp_path, FORMAT="image"), "'image'", "'images'", "'coco'", "'voc'")
    assert_fails("unlabeled", "expected {NAME: ..., FORMAT: voc or coco or yolo or images, ...}")
    texts = ["needs the folder", "/fotos", "['a.png']"]
    assert_fails(entry_of(tmp_path / "fotos"), *texts, error=FileNotFoundError)
