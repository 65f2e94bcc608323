"""tools/check_golden.py on recorded arrays of GHND, and on those of another configuration."""

import functools

import numpy as np
import pytest
from ghnd_fixture import CHANNELS, NOISE, is_input, make_fixture
from golden_tool import compared, write

fixture = functools.lru_cache(maxsize=None)(make_fixture)


def results(names):
    """The arrays that are computed from others, and the names of the gradients."""
    return {name for name in names if not is_input(name)} | {"full/grad"}


def not_used(output):
    (line,) = (line for line in output.splitlines() if "not used" in line)
    return line.rpartition(": ")[2].split(", ")


def test_recorded_fixture(tool, shared, capsys):
    path = shared / "golden" / "ghnd.npz"
    assert tool.main([str(path)]) == 0
    output = capsys.readouterr().out
    assert "ghnd: pass" in output and all(name.endswith(NOISE) for name in not_used(output))
    with np.load(path) as recorded:
        assert set(compared(output, "pass")) == results(recorded.files)


def test_fixture_of_another_configuration(tool, tmp_path, capsys):
    assert tool.main([write(tmp_path, fixture())]) == 0
    output = capsys.readouterr().out
    assert "ghnd: pass" in output and all(name.endswith(NOISE) for name in not_used(output))
    assert set(compared(output, "pass")) == results(fixture())


def test_fixture_has_the_arrays_of_the_recorded_one(shared):
    """But for those that are large there and whole here, or the other way round."""

    def names(arrays):
        whole = {name.partition("@")[0] for name in arrays}
        return {name for name in whole if not name.startswith(("recipe/", "full/img"))}

    with np.load(shared / "golden" / "ghnd.npz") as recorded:
        assert names(recorded.files) == names(fixture())


def test_fixture_has_something_to_compare():
    arrays = fixture()
    zero = [n for n, array in arrays.items() if array.dtype.kind == "f" and not array.any()]
    assert zero == []
    assert arrays["large/eval.z"].shape == (3, CHANNELS, 9, 7)
    kinds = {name.partition("@")[2] for name in arrays}
    assert kinds == {"", "stride97", "stride7", "shape", "sum", "l2"}
    for kind, zero_point in {"positive": 0, "negative": 255}.items():
        assert arrays[f"quant/{kind}/zero_point"] == zero_point
    # No gradient whose sign, all that Adam's first step takes of it, may be a rounding error.
    gradient = np.abs(arrays["full/grad/conv1.weight"])
    assert gradient.min() > 1e-5 * gradient.max()


def changed(array):
    """One number is another: the largest, by a thousandth, or by more than a level of a quantiser."""
    array, index = np.array(array), np.abs(array.astype(np.float64)).argmax()
    if array.dtype.kind in "iu":
        array.flat[index] -= 2
    else:
        array.flat[index] = array.flat[index] * 1.001 or 1e-3
    return array


def test_every_changed_array_fails(tool, tmp_path, capsys):
    """Those and no others; all at once, as each is compared by itself."""
    names = results(fixture()) - {"full/grad", "full/trainable"}
    arrays = {name: changed(array) if name in names else array for name, array in fixture().items()}
    assert tool.main([write(tmp_path, arrays)]) == 1
    output = capsys.readouterr().out
    assert set(compared(output, "FAIL")) == names
    assert set(compared(output, "pass")) == {"full/grad", "full/trainable"}


def test_changed_inputs_and_names_fail(tool, tmp_path, capsys):
    """What is computed from them does, and no more; again all at once."""
    arrays = dict(fixture())
    arrays["full/img1"] = arrays["full/img1"][::-1]
    arrays["large/teacher"] = arrays["large/teacher"][::-1]
    arrays["quant/mixed/x"] = arrays["quant/mixed/x"] + 1
    arrays["full/trainable"] = np.array([*arrays["full/trainable"][1:], "bn1.weight"])
    arrays["full/grad/layer2.0.conv1.weight"] = np.ones(1)
    assert tool.main([write(tmp_path, arrays)]) == 1
    output = capsys.readouterr().out
    failed = set(compared(output, "FAIL"))
    assert {"full/trainable", "full/grad", "full/x", "full/loss", "large/train.loss"} <= failed
    assert {"large/grad.z", "full/student/layer4", "full/teacher/layer4", "quant/mixed/q"} <= failed
    right = ("large/eval.", "large/q8.", "large/train.out", "small/", "quant/positive/", "recipe/")
    assert not any(name.startswith(right) for name in failed)


@pytest.mark.parametrize(
    "name", ["large/w/layer1.decoder.8.running_var", "full/grad/layer1.decoder.0.weight", "full/img0"]
)
def test_missing_array(tool, tmp_path, capsys, name):
    arrays = {key: array for key, array in fixture().items() if key != name}
    assert tool.main([write(tmp_path, arrays)]) == 2
    assert f"has no array '{name}'" in capsys.readouterr().err


def test_array_of_no_tensor(tool, tmp_path, capsys):
    arrays = {"recipe/layer5.0.conv1.weight": np.ones(8), **fixture()}
    assert tool.main([write(tmp_path, arrays)]) == 2
    assert "there is no tensor 'layer5.0.conv1.weight'" in capsys.readouterr().err
