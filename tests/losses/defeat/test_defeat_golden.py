"""tools/check_golden.py on recorded arrays of DeFeat, and on those of another configuration."""

import functools

import numpy as np
import pytest
from defeat_fixture import is_input, make_fixture
from golden_tool import compared, write

fixture = functools.lru_cache(maxsize=None)(make_fixture)


def results(names):
    """The arrays that are computed from others."""
    return {name for name in names if not is_input(name)}


def test_recorded_fixture(tool, shared, capsys):
    path = shared / "golden" / "defeat.npz"
    assert tool.main([str(path)]) == 0
    output = capsys.readouterr().out
    assert "defeat: pass" in output and "not used" not in output
    with np.load(path) as recorded:
        assert set(compared(output, "pass")) == results(recorded.files)


def test_fixture_of_another_configuration(tool, tmp_path, capsys):
    assert tool.main([write(tmp_path, fixture())]) == 0
    output = capsys.readouterr().out
    assert "defeat: pass" in output and "not used" not in output
    assert set(compared(output, "pass")) == results(fixture())


def test_fixture_of_another_seed(tool, tmp_path):
    assert tool.main([write(tmp_path, make_fixture(seed=6))]) == 0


def test_fixture_has_the_arrays_of_the_recorded_one(shared):
    """But for those of its coarsest level."""
    with np.load(shared / "golden" / "defeat.npz") as recorded:
        assert {name for name in recorded.files if not name.endswith("_P6")} <= set(fixture())


def test_fixture_has_something_to_compare():
    zero = {name for name, array in fixture().items() if array.size and not array.any()}
    unused = ("A_defeat_neck_mask_", "C_fgfi_", "F_neck_L1_")  # levels without an object
    assert all(name.startswith(unused) and name.endswith(("_P4", "_P5")) for name in zero), zero
    assert not any(len(fixture()[f"{kind}_gt_boxes_1"]) for kind in ("mask", "kd"))
    levels = [fixture()[name].tolist() for name in fixture() if name.startswith("mask_level_of_box_")]
    assert levels == [[0, 1, 1, 0, 0], [], [1, 0, 0, 0, 3], [0, 2]]


def changed(array):
    """One number is another: the largest, by a ten-thousandth, or 0 or 1 of a mask, or a level."""
    array, index = np.array(array), np.abs(array.astype(np.float64)).argmax()
    if array.dtype == np.uint8:
        array.flat[index] = 1 - array.flat[index]
    elif array.dtype.kind == "i":
        array.flat[index] += 1
    else:
        array.flat[index] = array.flat[index] * 1.0001 or 1e-4
    return array


def test_every_changed_array_fails(tool, tmp_path, capsys):
    """Those and no others; all at once, as each is compared by itself."""
    names = {name for name in results(fixture()) if fixture()[name].size}
    arrays = {name: changed(array) if name in names else array for name, array in fixture().items()}
    assert tool.main([write(tmp_path, arrays)]) == 1
    output = capsys.readouterr().out
    assert set(compared(output, "FAIL")) == names
    assert set(compared(output, "pass")) == results(fixture()) - names


ALONE = [
    *("mask_fpn_shapes", "mask_level_of_box_2", "gt_mask_P2", "roi_mask_phi0.7_P4"),
    *("bb_gt_mask_stride4", "A_defeat_neck_loss", "A_defeat_neck_mask_P3", "D_all_loss"),
    *("C_fgfi_mask_P5", "C_fgfi_losskd_neck", "A2_defeat_neck_noadapt_grad_neck_P5"),
    *("A3_defeat_neck_coco_w_losskd_neck_back", "B3_head_all_loss", "B4_head_correct_grad_cls"),
    *("A_defeat_neck_grad_adapt_weight_P4", "B_head_decouple_losskd_hcls", "B5_full_decay_grad_cls"),
    *("B2_head_decouple_T3_losskd_hcls_back", "B5_full_decay_losskd_neck_back"),
    *("E_bb_decouple_losskd_bb_back", "E_bb_decouple_grad_bb_C4", "F_neck_L1_grad_adapt_bias_P2"),
]


@pytest.mark.parametrize("name", ALONE)
def test_a_changed_array_fails_alone(tool, tmp_path, capsys, name):
    arrays = {**fixture(), name: changed(fixture()[name])}
    assert tool.main([write(tmp_path, arrays)]) == 1
    assert compared(capsys.readouterr().out, "FAIL") == [name]


@pytest.mark.parametrize(
    "name", ["kd_gt_boxes_0", "mask_gt_boxes_2", "cls_labels", "neck_teacher_q64_P3"]
)
def test_a_changed_input_fails(tool, tmp_path, name):
    arrays = {**fixture(), name: np.roll(fixture()[name], 1, axis=-1)}
    assert tool.main([write(tmp_path, arrays)]) == 1


def test_unknown_case(tool, tmp_path, capsys):
    arrays = {**fixture(), "G_other_loss": np.float64(1)}
    assert tool.main([write(tmp_path, arrays)]) == 2
    assert "has a case 'G_other'; known are ['A_defeat_neck', " in capsys.readouterr().err
