"""Batches of an evaluation: of one padded size, of all images, with the detections of image by image."""

import logging

import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, build_detection_test_loader
from detectron2.data import transforms as T
from detectron2.utils import comm
from torch import nn

from distill_d2.data import batched_test_loader, register_custom_datasets
from distill_d2.data.batches import BatchesOfOneSize
from distill_d2.testing import tiny_detector, write_dataset

SHAPES = [(40, 64), (64, 40), (48, 64), (64, 64), (20, 32), (64, 33), (90, 64), (41, 64)]


@pytest.fixture
def records(tmp_path):
    """Of images of 48x64 and 64x48 pixels in turn."""
    entry = write_dataset(tmp_path / "data", 10)
    register_custom_datasets([entry])
    return DatasetCatalog.get(entry["NAME"])


def mapper_with(*augmentations):
    return DatasetMapper(is_train=False, augmentations=list(augmentations), image_format="BGR")


def detecting(family):
    """A detector whose random heads return many boxes."""
    torch.manual_seed(0)
    model = tiny_detector(family).eval()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not name.startswith("backbone"):
            nn.init.normal_(module.weight, std=0.05)
    for module in model.modules():
        for name in ("test_score_thresh", "test_score_thresh_test"):
            if hasattr(module, name):
                setattr(module, name, 0.0)
    return model


def outputs(model, loader):
    """Each image's detections by its id, and the sizes of batches."""
    found, sizes = {}, []
    with torch.no_grad():
        for batch in loader:
            sizes.append(len(batch))
            for item, output in zip(batch, model(batch)):
                found[item["image_id"]] = output["instances"].get_fields()
    return found, sizes


@pytest.mark.parametrize("family, workers", [("retinanet", 0), ("faster", 0), ("fcos", 1)])
def test_detections_are_those_of_image_by_image(records, family, workers):
    model = detecting(family)
    mapper = mapper_with(T.ResizeShortestEdge(60, 90))  # 60x80: padded to 64x80, not 80x80
    single, ones = outputs(model, build_detection_test_loader(records, mapper=mapper))
    batched, sizes = outputs(model, batched_test_loader(records, mapper, model, 4, workers))
    assert ones == [1] * 10 and sizes == [4, 1, 4, 1] and batched.keys() == single.keys()
    assert sum(len(fields["scores"]) for fields in single.values()) > 100
    for key, fields in single.items():
        for name, expected in fields.items():
            expected, actual = (getattr(v, "tensor", v) for v in (expected, batched[key][name]))
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_images_share_a_batch_where_their_padding_is_one():
    """By divisibility 16, of a detector; the share of each process, and each image once."""
    records = [{"height": h, "width": w, "file_name": str(i)} for i, (h, w) in enumerate(SHAPES)]
    model = tiny_detector()  # pads to multiples of 16

    def batches(*augmentations):
        loader = batched_test_loader(records, mapper_with(*augmentations), model, 3)
        return list(loader.loader.batch_sampler), len(loader)

    assert batches() == ([[6], [3], [1, 5], [0, 2, 7], [4]], 5)
    assert batches(T.Resize((32, 48)), T.RandomFlip(0.0)) == ([[0, 1, 2], [3, 4, 5], [6, 7]], 3)
    same = T.ResizeShortestEdge(0, 1000)  # no resizing
    assert batches(same) == batches()
    longest = T.ResizeShortestEdge([100], 64, "choice")  # the long side is 64
    assert batches(longest)[0] == [[3], [1, 5, 6], [0, 2, 4], [7]]


def test_each_process_has_batches_of_its_own_share(monkeypatch):
    sizes = [(1, 1), (2, 2), None, (1, 1), (2, 2), (1, 1), (1, 1)]
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        shares.append(list(BatchesOfOneSize(sizes, 2)))
    assert shares == [[[1], [0, 3], [2]], [[4], [5, 6]]]


class OtherMapper(DatasetMapper):
    pass


@pytest.mark.parametrize(
    "mapper",
    [
        OtherMapper(is_train=False, augmentations=[], image_format="BGR"),
        mapper_with(T.ResizeShortestEdge([48, 64], 64, "choice")),
        mapper_with(T.RandomCrop("absolute", (8, 8))),
    ],
    ids=["mapper", "sizes", "crop"],
)
def test_unknown_sizes_are_evaluated_one_by_one_and_told(mapper, caplog):
    records = [{"height": 64, "width": 64, "file_name": "a"} for _ in range(3)]
    with caplog.at_level(logging.INFO):
        loader = batched_test_loader(records, mapper, tiny_detector(), 3)
    assert list(loader.loader.batch_sampler) == [[0], [1], [2]]
    assert "3 of 3 images are evaluated one by one, not in batches of 3" in caplog.text
    known = batched_test_loader([*records, {"file_name": "b"}], mapper_with(), tiny_detector(), 3)
    assert list(known.loader.batch_sampler) == [[0, 1, 2], [3]]
