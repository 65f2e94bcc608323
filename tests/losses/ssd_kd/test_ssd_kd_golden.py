"""tools/check_golden.py on recorded arrays of SSDKD, and on those of another configuration."""

import functools

import numpy as np
import pytest
from golden_tool import compared, write
from ssd_kd_fixture import is_input, make_fixture

fixture = functools.lru_cache(maxsize=None)(make_fixture)


def results(names):
    """The arrays that are computed from others."""
    return {name for name in names if not is_input(name)}


def test_recorded_fixture(tool, shared, capsys):
    path = shared / "golden" / "ssd_kd.npz"
    assert tool.main([str(path)]) == 0
    output = capsys.readouterr().out
    assert "ssd_kd: pass" in output and "not used" not in output
    with np.load(path) as recorded:
        assert set(compared(output, "pass")) == results(recorded.files)


def test_fixture_of_another_configuration(tool, tmp_path, capsys):
    assert tool.main([write(tmp_path, fixture())]) == 0
    output = capsys.readouterr().out
    assert "ssd_kd: pass" in output and "not used" not in output
    assert set(compared(output, "pass")) == results(fixture())


def test_fixture_of_another_seed(tool, tmp_path):
    assert tool.main([write(tmp_path, make_fixture(seed=6))]) == 0


def test_fixture_has_the_arrays_of_the_recorded_one(shared):
    with np.load(shared / "golden" / "ssd_kd.npz") as recorded:
        ours = {name.replace("soft_T2", "soft_T3") for name in fixture()}
        assert ours - set(recorded.files) == {"gt_2"} and set(recorded.files) <= ours


def test_fixture_has_something_to_compare():
    zero = {name for name, array in fixture().items() if array.size and not array.any()}
    assert zero == {"br_inactive_loss", "br_inactive_grad"}
    assert len(fixture()["gt_1"]) == 0 and (fixture()["detect_counts"][1:] > 7).all()
    losses = [fixture()[f"kd_{name}_loss"] for name in ("default", "badteacher")]
    assert losses[0] > losses[1] + 0.01  # by the bound
    assert 0 < fixture()["paper_br_swapped_m0_sum"] < fixture()["paper_br_m0_sum"]


def changed(array):
    """One number is another: the largest by a ten-thousandth, or by one of whole numbers."""
    array, index = np.array(array), np.abs(array.astype(np.float64)).argmax()
    if array.dtype.kind in "iu":
        array.flat[index] ^= 1
    else:
        array.flat[index] = array.flat[index] * 1.0001 or 1e-4
    return array


def test_every_changed_array_fails(tool, tmp_path, capsys):
    """Those and no others; all at once, as each is compared by itself."""
    names = results(fixture())
    arrays = {name: changed(array) if name in names else array for name, array in fixture().items()}
    assert tool.main([write(tmp_path, arrays)]) == 1
    output = capsys.readouterr().out
    assert set(compared(output, "FAIL")) == names and not compared(output, "pass")


@pytest.mark.parametrize("names", [["match_kd_conf_t"], ["kd_u1_loss", "hard_grad_loc_values"]])
def test_changed_arrays_fail_alone(tool, tmp_path, capsys, names):
    arrays = {**fixture(), **{name: changed(fixture()[name]) for name in names}}
    assert tool.main([write(tmp_path, arrays)]) == 1
    assert set(compared(capsys.readouterr().out, "FAIL")) == set(names)


@pytest.mark.parametrize(
    "name, change, depends",
    [
        ("conf_teacher_q64", lambda x: np.roll(x, 1, axis=0), "kd_default_loss"),
        ("loc_teacher_good_q64", lambda x: 9 * x, "kd_u1_loss"),
        ("loc_teacher_bad_q64", lambda x: 2 * x, None),  # only whether it is worse
        ("gt_2", lambda x: x[::-1], "match_kd_conf_t"),  # the last of them wins
        ("gt_2", lambda x: x * np.float32([1.1, 1, 1, 1, 1]), "match_ssd300_conf_t"),
    ],
)
def test_changed_inputs(tool, tmp_path, capsys, name, change, depends):
    arrays = {**fixture(), name: change(fixture()[name])}
    assert tool.main([write(tmp_path, arrays)]) == (depends is not None)
    failed = [line.split()[1] for line in capsys.readouterr().out.splitlines() if "| FAIL" in line]
    assert failed == [] if depends is None else depends in failed


def test_unknown_case(tool, tmp_path, capsys):
    arrays = {**fixture(), "kd_other_loss_bare": np.float64(1)}
    assert tool.main([write(tmp_path, arrays)]) == 2
    assert "has a case 'kd_other'; known are ['hard', 'kd_default', " in capsys.readouterr().err
