import contextlib

import pytest
import torch
from recorded import detector

from distill_d2.teacher import Teacher


@pytest.fixture
def observed():
    """A teacher that saw one image, with the features that its model itself computes."""

    def observe(family, *capabilities):
        # Unprepared, so that results are equal to the last bit.
        teacher = Teacher(detector(family), prepare=False)
        for capability in capabilities:
            teacher.view.require(capability)
        image = torch.randint(0, 256, (3, 64, 96)).float()
        model = teacher.model
        with torch.no_grad():
            features = model.backbone(((image - model.pixel_mean) / model.pixel_std)[None])
        stack.enter_context(teacher.view.recording())
        teacher.observe([image], (64, 96))
        return teacher.view, features

    with contextlib.ExitStack() as stack:
        yield observe
