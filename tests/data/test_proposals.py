"""Files of proposals are read without their code, and checked; names of datasets that lead elsewhere are told."""

import os
import pickle

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, build
from detectron2.structures import BoxMode

from distill_d2.data import check_dataset, check_name
from distill_d2.data.proposals import load_proposals, read_proposals
from distill_d2.testing import write_dataset

BOXES, LOGITS = np.arange(8, dtype=np.float32).reshape(2, 4), np.array([0.1, 0.9], np.float32)
WHOLE = {"ids": [7, "b"], "boxes": [BOXES, BOXES[:0]], "objectness_logits": [LOGITS, LOGITS[:0]]}
OF_DETECTRON_1 = {"indexes": WHOLE["ids"], "boxes": WHOLE["boxes"], "scores": WHOLE["objectness_logits"]}


class Evil:
    def __reduce__(self):
        return os.mkdir, ("made_by_a_pickle",)


def write(folder, content):
    path = folder / "proposals.pkl"
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    return str(path)


@pytest.mark.parametrize("content", [WHOLE, OF_DETECTRON_1, {**WHOLE, "bbox_mode": 1}])
def test_detectron2_reads_proposals_through_us(tmp_path, content):
    records = [{"image_id": "7"}, {"image_id": "b"}]
    first, second = build.load_proposals_into_dataset(records, write(tmp_path, content))
    assert first["proposal_boxes"].tolist() == BOXES[::-1].tolist()  # the best first
    assert first["proposal_objectness_logits"].tolist() == LOGITS[::-1].tolist()
    assert first["proposal_bbox_mode"] is BoxMode(content.get("bbox_mode", 0))
    assert second["proposal_boxes"].shape == (0, 4)


@pytest.mark.parametrize(
    "content, words",
    [
        ({**WHOLE, "cfg": Evil()}, "uses posix.mkdir; only numpy arrays"),
        ([1], "holds a list, not a dict"),
        ({"ids": []}, r"lacks \['boxes', 'objectness_logits'\]; it has \['ids'\]"),
        ({**WHOLE, "ids": [7]}, "lists of one length.*'ids': 1, 'boxes': 2"),
        ({**WHOLE, "ids": 2}, "lists of one length"),
        ({**WHOLE, "boxes": [BOXES.T, BOXES]}, r"image 7 has .*\(4, 2\).*expected arrays of \(N, 4\)"),
        ({**WHOLE, "objectness_logits": [[0.1, 0.9], LOGITS]}, "image 7 has .*list.*expected arrays"),
        ({**WHOLE, "bbox_mode": 4}, r"bbox_mode 4; expected one of \[0, 1\]"),
        ({**WHOLE, "boxes": [BOXES * np.nan, BOXES[:0]]}, "image 7 has boxes .* not finite numbers"),
        ({**WHOLE, "boxes": [BOXES.astype(str), BOXES[:0]]}, "image 7 has boxes .* not finite numbers"),
        (b"", "it is empty"),
        (b"<html>", "web page"),
        (pickle.dumps(WHOLE)[:-40], "truncated"),
    ],
)
def test_files_of_proposals_that_are_refused(tmp_path, monkeypatch, content, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"file of proposals '.*proposals.pkl'.*{words}"):
        build.load_proposals_into_dataset([], write(tmp_path, content))
    assert not (tmp_path / "made_by_a_pickle").exists()


def test_proposals_of_another_dataset(tmp_path):
    with pytest.raises(
        ValueError, match=r"lacks 1 of the dataset's 2 images, the first has the id 8; its ids begin"
    ):
        load_proposals([{"image_id": 7}, {"image_id": 8}], write(tmp_path, WHOLE))
    with pytest.raises(FileNotFoundError, match="file of proposals 'none.pkl' does not exist"):
        read_proposals("none.pkl")


@pytest.mark.parametrize(
    "name", ["../out", "a/../../out", "/out", "a//b", "..", "", "a\\..\\b", "a\nb", "a\0b"]
)
def test_names_of_datasets_that_lead_out_of_the_folder(name):
    with pytest.raises(ValueError, match="DATASETS.TEST names the dataset .*results go to a folder"):
        check_name(name, "DATASETS.TEST")
    DatasetCatalog.register(name, list)
    try:
        with pytest.raises(ValueError, match="results go to a folder"):
            check_dataset(name)
    finally:
        DatasetCatalog.remove(name)


def test_names_of_datasets_that_stay_inside():
    for name in ("coco_2017_val", "mine/val", "a..b", "données"):
        check_name(name, "DATASETS.TEST")


def test_addresses_are_told(tmp_path, caplog):
    """Below a folder an address is a missing file; alone it is fetched in training, which is said."""
    folder = write_dataset(tmp_path)["IMAGES"]
    record = {
        "image_id": 1,
        "height": 64,
        "width": 64,
        "annotations": [{"bbox": [0, 0, 9, 9], "bbox_mode": 0, "category_id": 0}],
    }
    names = {"below": f"{folder}/http://host/a.jpg", "alone": "https://host/a.jpg"}
    for name, file_name in names.items():
        DatasetCatalog.register(name, lambda file_name=file_name: [{**record, "file_name": file_name}])
    try:
        with pytest.raises(FileNotFoundError, match="an address below a folder is not a file"):
            check_dataset("below", need_annotations=False)
        check_dataset("alone", need_annotations=False)
    finally:
        for name in names:
            DatasetCatalog.remove(name)
    assert "1 file names are addresses, the first is 'https://host/a.jpg'" in caplog.text
