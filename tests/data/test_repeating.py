"""Which training images are the same in each pass over the data, by the augmentations that are built."""

import itertools

import pytest
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T

from distill_d2.data import (
    NamedReadErrors,
    ResumableTrainingSampler,
    build_mapper,
    build_train_loader,
    repeating_images,
)
from distill_d2.testing import tiny_config

RECORDS = [{"file_name": f"{n}.png", "height": 64, "width": 48} for n in range(6)]
VERTICAL = T.RandomFlip(horizontal=False, vertical=True)


def loader_of(mapper):
    sampler = ResumableTrainingSampler(lambda seed: itertools.count(), batch_size=2, seed=0)
    return build_train_loader(RECORDS, NamedReadErrors(mapper), sampler, 0)


def mapper_of(*augmentations):
    return DatasetMapper(is_train=True, augmentations=list(augmentations), image_format="BGR")


class Crop(T.RandomCrop):
    """A user's."""


def own_mapper(record):
    return record


@pytest.mark.parametrize(
    "opts, message",
    [
        (
            ["INPUT.MIN_SIZE_TRAIN", (48, 64)],
            r"ResizeShortestEdge draws .* \[48, 64\].*INPUT.MIN_SIZE_TRAIN",
        ),
        (["INPUT.CROP.ENABLED", True], "RandomCrop .*INPUT.CROP.ENABLED"),
        (["INPUT.AUGMENTATIONS", "ssd"], "PhotometricDistortion .*INPUT.AUGMENTATIONS"),
    ],
)
def test_images_that_differ_from_pass_to_pass_are_refused(opts, message):
    cfg = tiny_config()
    cfg.merge_from_list(opts)
    with pytest.raises(ValueError, match=message):
        repeating_images(loader_of(build_mapper(cfg, is_train=True)))


@pytest.mark.parametrize(
    "loader, message",
    [
        (loader_of(own_mapper), "mapper own_mapper .*INPUT.MAPPER"),
        (loader_of(mapper_of(Crop("absolute", (8, 8)))), "Crop may make another image"),
        (iter([]), "the data loader is not"),
    ],
)
def test_what_is_unknown_is_refused(loader, message):
    with pytest.raises(ValueError, match=message):
        repeating_images(loader)


@pytest.mark.parametrize(
    "augmentations, flips, size",
    [
        ([T.Resize((32, 64)), T.RandomFlip()], [(2,)], (32, 64)),
        ([T.ResizeShortestEdge(24, 99, "choice"), VERTICAL], [(1,)], (32, 24)),
        ([T.ResizeShortestEdge((24, 24), 30), T.RandomFlip(), VERTICAL], [(1,), (2,), (1, 2)], (30, 23)),
        # Mirrored and then resized an image may have other pixels.
        ([T.RandomFlip(), T.Resize((16, 16))], [], (16, 16)),
        ([T.RandomFlip(prob=0.0)], [], (64, 48)),
    ],
)
def test_flips_and_sizes(augmentations, flips, size):
    found = repeating_images(loader_of(mapper_of(*augmentations)))
    assert (found.flips, found.sizes, found.count) == (flips, [size] * 6, 6)
    assert found.batch_size == 2 and not found.grouped
