"""A step's ground truth as tensors of fixed shape."""

import pytest
import torch
from detectron2.structures import Boxes, Instances

from distill_d2.testing.synchronization import no_synchronization
from distill_d2.views import Batch

FIRST, SECOND, THIRD = [1.0, 2, 30, 40], [5.5, 6, 7, 8], [0.0, 0, 64, 64]


def batch_of(*images, dtype=torch.float32):
    inputs = []
    for boxes in images:
        boxes = Boxes(torch.tensor(boxes, dtype=torch.float64).view(-1, 4))
        boxes.tensor = boxes.tensor.to(dtype)
        inputs.append(
            {"image": torch.empty(3, 64, 80), "instances": Instances((64, 80), gt_boxes=boxes)}
        )
    return Batch(inputs, (64, 80), iteration=0, max_iter=1)


def test_boxes_are_filled_up_to_the_longest_image():
    boxes, valid = batch_of([FIRST], [], [SECOND, THIRD, FIRST]).padded_boxes()
    nothing = [0.0] * 4
    assert boxes.tolist() == [[FIRST, nothing, nothing], [nothing] * 3, [SECOND, THIRD, FIRST]]
    assert valid.tolist() == [[True, False, False], [False] * 3, [True] * 3]
    assert boxes.dtype == torch.float32 and valid.dtype == torch.bool


def test_equally_many_boxes():
    boxes, valid = batch_of([FIRST, SECOND], [THIRD, FIRST]).padded_boxes()
    assert boxes.tolist() == [[FIRST, SECOND], [THIRD, FIRST]] and valid.all()


@pytest.mark.parametrize("images", [1, 3])
def test_without_any_boxes_there_is_one_place(images):
    boxes, valid = batch_of(*[[]] * images).padded_boxes()
    assert boxes.tolist() == [[[0.0] * 4]] * images and valid.tolist() == [[False]] * images


def test_boxes_of_another_precision():
    boxes, _ = batch_of([SECOND], [], dtype=torch.float64).padded_boxes()
    assert boxes.dtype == torch.float32 and boxes[0, 0].tolist() == SECOND


def test_the_ground_truth_stays_as_it_is():
    batch = batch_of([FIRST], [SECOND, THIRD])
    boxes, _ = batch.padded_boxes()
    boxes += 1
    found = [item["instances"].gt_boxes.tensor.tolist() for item in batch.inputs]
    assert found == [[FIRST], [SECOND, THIRD]]


def test_an_image_without_annotations():
    batch = batch_of([FIRST], [SECOND])
    del batch.inputs[1]["instances"]
    with pytest.raises(KeyError, match="instances"):
        batch.padded_boxes()


def test_nothing_waits_for_the_device():
    batch = batch_of([FIRST], [SECOND, THIRD], [])
    with no_synchronization():
        batch.padded_boxes()


def test_image_sizes_are_heights_and_widths():
    batch = batch_of([FIRST], [])
    batch.inputs[1]["image"] = torch.empty(3, 48, 64)
    assert batch.image_sizes == [(64, 80), (48, 64)]
