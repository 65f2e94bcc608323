"""Images without annotations: a folder of them."""

import itertools

import numpy as np
import pytest
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.data.detection_utils import read_image
from PIL import Image
from small_datasets import assert_fails, load

from distill_d2.data import NamedReadErrors, check_dataset
from distill_d2.data.images import check_image, load_images
from distill_d2.data.read_errors import UnreadableRecord
from distill_d2.testing.tiny import tiny_config

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


# What detectron2 reads of images.


RAMP = np.arange(64 * 64, dtype=np.int64).reshape(64, 64)


@pytest.mark.parametrize(
    "pixels, ending, mode",
    [
        ((RAMP * 16).astype(np.uint16), "png", "I;16"),
        ((RAMP * 16).astype(np.uint16), "tif", "I;16"),
        ((RAMP * 16).astype(np.int32), "tif", "I"),
        ((RAMP / 4096).astype(np.float32), "tif", "F"),
        ((RAMP - 9).astype(np.float32), "tif", "F"),
    ],
)
def test_images_of_more_than_8_bits_are_told_before_and_in_training(tmp_path, pixels, ending, mode):
    path = tmp_path / f"a.{ending}"
    Image.fromarray(pixels).save(path)
    record = {"file_name": str(path), "height": 64, "width": 64, "annotations": []}
    text = rf"a.{ending}.*more than 8 bits per channel \(mode {mode}\), with values from .*scale it to 8 bits"
    with pytest.raises(ValueError, match=text):
        check_image(record)
    assert check_image(record, deep=True) == []  # for a mapper of the user's own
    with pytest.raises(UnreadableRecord, match=text):
        NamedReadErrors(DatasetMapper(tiny_config(), True))(record)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_images_that_are_read_rightly(tmp_path, mode):
    gray = Image.fromarray((RAMP // 16).astype(np.uint8))
    wide = {"I;16": np.uint16, "I": np.int32, "F": np.float32}
    image = Image.fromarray((RAMP // 16).astype(wide[mode])) if mode in wide else gray.convert(mode)
    path = tmp_path / "a.tif"
    image.save(path)
    assert check_image({"file_name": path, "height": 64, "width": 64}) == []
    shown = np.asarray(gray.convert("1" if mode == "1" else "L"), np.int64) * (255 if mode == "1" else 1)
    assert np.abs(read_image(str(path), "BGR")[..., 1].astype(np.int64) - shown).max() <= 2


def test_remarks_on_images(tmp_path, caplog):
    frames = [Image.new("L", (60, 40), color) for color in (0, 255)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    Image.new("RGBA", (60, 40), (9, 9, 9, 100)).save(tmp_path / "b.png")
    write(tmp_path / "c.jpg", exif=turned_note())
    entry = entry_of(tmp_path)
    load(entry)
    check_dataset(entry["NAME"], check_images=9, need_annotations=False)
    assert "1 of 3 images have several frames" in caplog.text and "a.gif" in caplog.text
    assert "1 of 3 images have transparent pixels" in caplog.text and "b.png" in caplog.text
    with pytest.raises(
        ValueError, match="c.jpg.*got .height, width. .60, 40., expect .40, 60..*EXIF orientation"
    ):
        check_image({"file_name": str(tmp_path / "c.jpg"), "height": 40, "width": 60})


def turned_note():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


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
