"""What keeps a teacher's outputs: the same numbers, found by what they depend on, and no damaged file."""

import errno
import os

import pytest
import torch
from detectron2.modeling import build_model

from distill_d2.teacher import Teacher
from distill_d2.teacher.cache import (
    CachePlan,
    CacheSettings,
    FolderStore,
    Layout,
    MemoryStore,
    fingerprint,
)
from distill_d2.testing.tiny import tiny_config

SIZE = (64, 96)
ENTRY = [
    torch.arange(12.0).view(1, 2, 3, 2),
    torch.arange(24.0).view(1, 4, 3, 2).contiguous(memory_format=torch.channels_last),
    torch.tensor([[True, False]]),
    torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16),
    torch.empty(1, 7, 5, device="meta"),
]


def assert_entry(found):
    assert [t.dtype for t in found] == [t.dtype for t in ENTRY]
    for one, other in zip(found[:-1], ENTRY):
        assert torch.equal(one, other) and one.stride() == other.stride()
    assert found[-1].is_meta and found[-1].shape == (1, 7, 5)


@pytest.fixture
def store(tmp_path):
    return FolderStore(str(tmp_path), "teacher", 10**6)


def test_folder_returns_what_was_put(store, tmp_path):
    assert store.get("a1") is None
    store.put("a1", ENTRY)
    assert_entry(store.get("a1"))
    other = FolderStore(str(tmp_path), "teacher", 10**6)  # of another run
    assert_entry(other.get("a1"))
    assert FolderStore(str(tmp_path), "another", 10**6).get("a1") is None


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b[:9], lambda b: b"", lambda b: b[:-1] + b"!"]
)
def test_damaged_files_are_not_read_and_replaced(store, tmp_path, damage):
    store.put("a1", ENTRY)
    path = tmp_path / "teacher" / "a1" / "a1"
    path.write_bytes(damage(path.read_bytes()))
    assert store.get("a1") is None
    store.put("a1", ENTRY)
    assert_entry(store.get("a1"))


def test_a_killed_run_leaves_nothing_that_is_read(store, tmp_path):
    store.put("a1", ENTRY)
    begun = tmp_path / "teacher" / "a1" / "a2.host-1-1.partial"
    begun.write_bytes(b"half")
    os.utime(begun, (0, 0))
    young = begun.with_name("a3.host-1-2.partial")  # another run's, which is writing it
    young.write_bytes(b"half")
    again = FolderStore(str(tmp_path), "teacher", 10**6)
    assert not begun.exists() and young.exists()
    assert again.get("a2") is None and again.get("a3") is None


def test_a_limit_is_of_all_runs_together(tmp_path, store, caplog):
    store.put("a1", ENTRY)
    size = (tmp_path / "teacher" / "a1" / "a1").stat().st_size
    stores = [FolderStore(str(tmp_path), name, 3 * size) for name in ("teacher", "other")]
    for name in ("b1", "b2", "b3"):
        for each in stores:
            each.put(name, ENTRY)
    kept = [each.get(name) is not None for name in ("b1", "b2", "b3") for each in stores]
    assert sum(kept) == 2
    assert caplog.text.count("TEACHER_CACHE_GB is used up") == 2
    assert_entry(stores[0].get("a1"))


def test_a_full_disk_ends_the_keeping_and_not_the_run(store, monkeypatch, caplog, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    store.put("a1", ENTRY)
    store.put("a2", ENTRY)
    assert caplog.text.count("No space left") == 1
    assert not list(tmp_path.glob("*/*/*"))


def test_memory_keeps_the_first(caplog):
    store = MemoryStore(2 * sum(t.nbytes for t in ENTRY if not t.is_meta))
    for name in ("a", "b", "c"):
        store.put(name, ENTRY)
    assert [store.get(name) is ENTRY for name in ("a", "b", "c")] == [True, True, False]
    assert store.full and "TEACHER_CACHE_GB is used up" in caplog.text


def teacher(channels=16, levels=("p2",)):
    torch.manual_seed(0)
    found = Teacher(build_model(tiny_config(channels=channels)))
    for name in levels:
        found.view.require_level(name)
    return found


def test_a_fingerprint_is_of_all_that_outputs_depend_on():
    first = fingerprint(teacher().view, "BGR")
    assert first == fingerprint(teacher().view, "BGR")
    changed = teacher()
    next(changed.model.backbone.bottom_up.parameters()).view(-1)[0] += 1e-6
    fused, mean = teacher(), teacher()
    fused.model.backbone._fuse_type = "avg"
    mean.model.pixel_mean += 1
    others = [changed, fused, mean, teacher(levels=("p3",))]
    found = {first, fingerprint(teacher().view, "RGB"), *(fingerprint(t.view, "BGR") for t in others)}
    assert len(found) == 6


@pytest.fixture
def kept():
    """A teacher that keeps its outputs, and those of an image 48x80 padded to SIZE."""
    found = teacher(levels=("p2", "p4"))
    found.view.require("dense")
    found.keep_outputs(MemoryStore(10**8), flips=[(2,)])
    torch.manual_seed(1)
    image = torch.randint(0, 256, (3, 48, 80), dtype=torch.uint8)
    read(found, image)
    return found, image


def read(found, image, size=SIZE):
    with found.view.recording():
        found.observe([image], size, [image])
        logits = found.view.dense().logits
        return [found.view.level("p2"), found.view.level("p4"), logits, found.view.level("p3")]


def counted(found):
    calls = []
    found.view.model.backbone.register_forward_pre_hook(lambda *_: calls.append(1))
    found.view.model.head.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def test_kept_outputs_are_those_of_image_mirror_image_and_padding(kept):
    found, image = kept
    calls = counted(found)
    for pixels in (image, image.flip(2)):
        *parts, unread = read(found, pixels)
        assert not calls
        expected = read(teacher_like(found), pixels)
        for part, other in zip(parts, expected):
            torch.testing.assert_close(part, other, rtol=1e-5, atol=1e-5)
        assert (
            unread.isnan().all() and unread.shape == expected[3].shape
        )  # what no loss has stated to read
    read(found, image, (96, 96))
    assert len(calls) == 2  # once backbone and head, for image and mirror image together
    read(found, image.flip(1))
    assert len(calls) == 4


def teacher_like(found):
    plain = teacher(levels=("p2", "p4"))
    plain.view.require("dense")
    return plain


def test_a_lent_teacher_and_its_copies_keep_nothing(kept):
    found, image = kept
    calls = counted(found)
    with found.lent():
        read(found, image)
    assert len(calls) == 2
    assert found.__getstate__()["cache"] is None
    found.apply(lambda tensor: tensor.double())
    assert found.cache is None


@pytest.mark.parametrize(
    "output, message",
    [
        (torch.zeros(5, 3), r"a tensor of shape \(5, 3\)"),
        ({"p2": [torch.zeros(3, 1), torch.tensor(1.0)]}, r"a tensor of shape \(\)"),
        ((torch.zeros(3, 1), 7), "a int"),
    ],
)
def test_outputs_without_a_part_for_each_image_are_refused(output, message):
    outputs = {"backbone.fpn": [torch.zeros(3, 2), output]}
    with pytest.raises(ValueError, match=f"TEACHER_CACHE: .*'backbone.fpn' returns {message}"):
        Layout.checked(teacher().view, outputs, 3)


PLAN = CacheSettings("memory", gigabytes=1.0)


def pad(size):
    return tuple(-(-side // 32) * 32 for side in size)


def plan(sizes, settings=PLAN, flips=1, grouped=True):
    found = CachePlan(sizes, flips, grouped, pad, settings)
    found.bytes_per_pixel = 100.0
    return found


def test_paddings_are_those_of_the_batches_that_an_image_may_be_in():
    sizes = [(90, 128), (90, 128), (60, 128), (128, 96), (128, 60)]
    found = plan(sizes)
    assert found.common == (96, 128)
    assert found.paddings((60, 128)) == [(64, 128), (96, 128)]
    assert found.paddings((90, 128)) == [(96, 128)]
    assert found.paddings((128, 60)) == [(128, 64), (128, 96)]
    pixels = 128 * (96 + 96 + 64 + 96 + 96 + 64 + 96)
    assert found.needed == pixels * 100 * 2
    assert found.all_paddings and found.share == 1 and not found.warnings()
    mixed = plan(sizes, grouped=False)
    assert mixed.paddings((90, 128)) == [(96, 128), (128, 128)]


def test_a_limit_below_what_is_needed_leaves_a_share():
    found = plan([(64, 64)] * 10, CacheSettings("memory", gigabytes=4 * 64 * 64 * 100 * 2 / 2**30))
    assert not found.all_paddings and found.share == pytest.approx(0.4 * 0.98)
    assert "room for 39% of the images" in found.warnings()[0]


def test_a_share_of_the_images_is_kept_with_their_mirror_images():
    teacher_of_all = teacher()
    layout, store = teacher_of_all.layout(), MemoryStore(10**8)
    teacher_of_all.keep_outputs(store, layout, flips=[(2,)], share=0.3)
    cache = teacher_of_all.cache
    cache._compute = lambda images, size: {"backbone": [{"p2": torch.zeros(len(images), 1)}]}
    torch.manual_seed(0)
    images = torch.randint(0, 256, (200, 3, 4, 4), dtype=torch.uint8)
    kept = [cache._compute_kept(image, image, SIZE, None) is not None for image in images]
    mirrored = [cache._compute_kept(image, image, SIZE, None) is not None for image in images.flip(3)]
    assert kept == mirrored and 40 <= sum(kept) <= 80
    assert len(store._entries) == 2 * sum(kept)


def test_many_paddings_are_told():
    found = plan([(32 * n, 32 * (20 - n)) for n in range(1, 20)], grouped=False)
    assert not found.all_paddings and "INPUT.FIXED_SIZE makes it one" in found.warnings()[0]
