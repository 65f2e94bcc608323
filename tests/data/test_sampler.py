"""The resumable sampler against detectron2's own classes."""

import itertools
import random

import pytest
import torch
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm

from distill_d2.data import ResumableTrainingSampler, build_train_loader, end_workers

SIZE, BATCH, SEED = 23, 3, 7


@pytest.fixture(params=[(0, 1), (0, 2), (1, 2)], ids=["alone", "rank 0 of 2", "rank 1 of 2"])
def rank(request, monkeypatch):
    monkeypatch.setattr(comm, "get_rank", lambda: request.param[0])
    monkeypatch.setattr(comm, "get_world_size", lambda: request.param[1])
    return request.param[0]


def _wide(size=SIZE):
    chance = random.Random(3)
    return [chance.random() < 0.3 for _ in range(size)]


def _sampler(seed=SEED, shuffle=True, **keys):
    return ResumableTrainingSampler(
        lambda seed: TrainingSampler(SIZE, shuffle, seed), batch_size=BATCH, seed=seed, **keys
    )


def _take(indices, count):
    return list(itertools.islice(indices, count))


def _batches(indices, count, batch=BATCH):
    taken = _take(indices, count * batch)
    return [taken[start : start + batch] for start in range(0, len(taken), batch)]


def _detectron2_batches(wide, count, shuffle=True):
    """Indices of the batches of detectron2's sampler and AspectRatioGroupedDataset."""
    sampler = TrainingSampler(len(wide), shuffle=shuffle, seed=SEED)
    images = ({"index": i, "width": 2 if wide[i] else 1, "height": 1 if wide[i] else 2} for i in sampler)
    grouped = AspectRatioGroupedDataset(images, BATCH)
    return [[image["index"] for image in batch] for batch in _take(grouped, count)]


@pytest.mark.parametrize("shuffle", [True, False])
def test_grouping_gives_detectron2s_batches(rank, shuffle):
    grouped = _sampler(wide=_wide(), shuffle=shuffle)
    assert _batches(grouped, 60) == _detectron2_batches(_wide(), 60, shuffle)
    plain = _sampler(shuffle=shuffle)
    assert _take(plain, 200) == _take(TrainingSampler(SIZE, shuffle=shuffle, seed=SEED), 200)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_resumes_with_any_number_of_workers(workers):
    expected = _detectron2_batches(_wide(), 12)

    def batches(skipped, count):
        sampler = _sampler(wide=_wide())
        sampler.skip_batches(skipped)
        loader = build_train_loader([{"index": i} for i in range(SIZE)], dict, sampler, workers)
        return [[image["index"] for image in batch] for batch in _take(loader, count)]

    assert batches(0, 12) == expected
    assert batches(5, 7) == expected[5:]
    end_workers()


@pytest.mark.parametrize("wide", [None, _wide()], ids=["plain", "grouped"])
@pytest.mark.parametrize("skipped", [0, 1, 17, 59])
def test_resumed_order_is_the_uninterrupted_one(rank, wide, skipped):
    """And torch's random numbers stay."""
    before = torch.get_rng_state()
    whole = _batches(_sampler(wide=wide), 80)
    resumed = _sampler(wide=wide, seed=0)
    resumed.seed = SEED
    resumed.skip_batches(skipped)
    assert _batches(resumed, 80 - skipped) == whole[skipped:]
    assert torch.equal(torch.get_rng_state(), before)


def test_wrong_batch_size():
    with pytest.raises(ValueError, match="batch_size is 0; expected at least 1"):
        ResumableTrainingSampler(lambda seed: TrainingSampler(SIZE, seed=seed), batch_size=0)


def test_mapper_that_skips_images():
    """Another image in its place, and never an endless search."""

    def some(record):
        return record if record["index"] else None

    def batches(mapper):
        return build_train_loader([{"index": i} for i in range(SIZE)], mapper, _sampler(), 0)

    taken = _take(batches(some), 20)
    assert len(taken) == 20 and all(image["index"] for batch in taken for image in batch)
    with pytest.raises(ValueError, match="returned None for 100 images in a row"):
        next(iter(batches(lambda record: None)))
