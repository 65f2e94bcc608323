"""The recorded numbers of AdelaiDet's CondInst, and that a changed one is noticed."""

import numpy as np
import pytest
from golden_tool import compared, write


@pytest.fixture
def arrays(shared):
    with np.load(shared / "golden" / "adet_condinst.npz") as file:
        return {name: file[name] for name in file.files}


def test_all_arrays(tool, shared, arrays, capsys):
    assert tool.main([str(shared / "golden" / "adet_condinst.npz")]) == tool.PASS
    output = capsys.readouterr().out
    # What is computed from.
    read = ("image", "keys", "fn/aligned_bilinear/in", "fn/dice/pred", "fn/dice/target")
    parts = ("mask_feats", "params", "locations", "im_inds", "fpn_levels")
    read += tuple(f"fn/dyn/{part}" for part in parts)
    read += tuple(f"gt/img{i}/{part}" for i in (0, 1) for part in ("boxes", "classes", "poly"))
    inputs = {name for name in arrays if name.startswith(read)}
    assert set(compared(output, "pass")) == set(arrays) - inputs and "not used" not in output


def only(arrays, *kept):
    """A small fixture: the inputs and what is asked for."""
    always = ("keys", "image", "gt/", "eval/img", "fn/", "train/poly", "targets/")
    return {name: value for name, value in arrays.items() if name.startswith((*always, *kept))}


def flipped(packed, bits):
    """With so many pixels of the first mask changed."""
    masks = np.unpackbits(packed, axis=1)
    masks[0, :bits] ^= 1
    return np.packbits(masks, axis=1)


@pytest.mark.parametrize(
    "name, change, fails",
    [
        ("train/poly/loss_mask", lambda x: x * 1.0005, True),
        ("train/poly/num_mask_instances", lambda x: x + 1, True),
        ("train/poly/locations", lambda x: x + 8, True),
        ("targets/labels0", lambda x: np.roll(x, 1), True),
        ("gt/img1/bitmasks_s4", lambda x: 1 - x, True),
        ("eval/img1/mask_logits_first4", lambda x: x + 3e-4, True),
        ("eval/post30/img0/pred_masks_packed", lambda x: flipped(x, 9), True),
        ("eval/post30/img0/pred_masks_packed", lambda x: flipped(x, 4), False),
        ("eval/post30/img1/top_feat", lambda x: x + 3e-4, True),
    ],
)
def test_a_wrong_array_is_found(tool, arrays, tmp_path, capsys, name, change, fails):
    arrays = only(arrays, "eval/post30")
    arrays[name] = change(arrays[name])
    assert tool.main([write(tmp_path, arrays)]) == (tool.FAIL if fails else tool.PASS)
    assert name in compared(capsys.readouterr().out, "FAIL" if fails else "pass")


def test_instances_in_another_order(tool, arrays, tmp_path):
    arrays = only(arrays)
    for part in ("gt_inds", "locations", "fpn_levels", "labels"):
        arrays[f"train/poly/{part}"] = arrays[f"train/poly/{part}"][::-1]
    assert tool.main([write(tmp_path, arrays)]) == tool.PASS


def test_an_unknown_variant(tool, arrays, tmp_path, capsys):
    arrays = {**only(arrays), "train/boxes/loss_mask": np.zeros(1)}
    assert tool.main([write(tmp_path, arrays)]) == tool.UNREADABLE
    assert "['boxes']; known are ['poly'" in capsys.readouterr().err
