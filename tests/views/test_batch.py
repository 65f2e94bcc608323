"""A step's ground truth as tensors of fixed shape."""

import pytest
import torch
from detectron2.structures import Boxes, Instances

from distill_d2.views import Batch

FIRST, SECOND, THIRD = [1.0, 2, 30, 40], [5.5, 6, 7, 8], [0.0, 0, 64, 64]

SIZES = [(64, 80), (96, 48), (50, 70)]


def batch_of(*images, dtype=torch.float32):
    """Images of SIZES with boxes of the classes 5, 6, ..."""
    inputs = []
    for size, boxes in zip(SIZES, images):
        given = Boxes(torch.tensor(boxes, dtype=torch.float64).view(-1, 4))
        given.tensor = given.tensor.to(dtype)
        instances = Instances(size, gt_boxes=given, gt_classes=5 + torch.arange(len(boxes)))
        inputs.append({"image": torch.empty(3, *size), "instances": instances})
    return Batch(inputs, (96, 96), iteration=0, max_iter=1)


def test_image_sizes_are_heights_and_widths():
    assert batch_of([], [], []).image_sizes == [(64, 80), (96, 48), (50, 70)]


def test_truth_is_padded_to_the_longest_image():
    truth = batch_of([FIRST], [], [SECOND, THIRD, FIRST]).truth
    nothing = [0.0] * 4
    assert truth.boxes.tolist() == [[FIRST, nothing, nothing], [nothing] * 3, [SECOND, THIRD, FIRST]]
    assert truth.classes.tolist() == [[5, 0, 0], [0] * 3, [5, 6, 7]]
    assert truth.valid.tolist() == [[True, False, False], [False] * 3, [True] * 3]
    assert truth.counts == [1, 0, 3]
    dtypes = (truth.boxes.dtype, truth.classes.dtype, truth.valid.dtype)
    assert dtypes == (torch.float32, torch.int64, torch.bool)


@pytest.mark.parametrize("images", [1, 3])
def test_without_any_boxes_there_is_one_place(images):
    truth = batch_of(*[[]] * images).truth
    assert truth.boxes.tolist() == [[[0.0] * 4]] * images and truth.valid.tolist() == [[False]] * images


def test_truth_is_made_once_and_the_given_boxes_stay_as_they_are():
    batch = batch_of([FIRST], [SECOND, THIRD])
    assert batch.truth is batch.truth
    batch.truth.boxes.add_(1)
    found = [item["instances"].gt_boxes.tensor.tolist() for item in batch.inputs]
    assert found == [[FIRST], [SECOND, THIRD]]


def test_instances_are_the_truth_image_by_image():
    found = batch_of([FIRST], [], [SECOND, THIRD]).instances()
    assert [each.image_size for each in found] == SIZES
    assert [each.gt_boxes.tensor.tolist() for each in found] == [[FIRST], [], [SECOND, THIRD]]
    assert [each.gt_classes.tolist() for each in found] == [[5], [], [5, 6]]


def test_an_image_without_annotations():
    batch = batch_of([FIRST], [SECOND])
    del batch.inputs[1]["instances"]
    batch.inputs[1]["file_name"] = "a.jpg"
    with pytest.raises(KeyError, match="image 'a.jpg' has no annotations"):
        batch.truth  # noqa: B018
