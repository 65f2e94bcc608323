"""The recorded numbers of AdelaiDet's FCOS, and that a changed one is noticed."""

import numpy as np
import pytest
from golden_tool import compared, write


@pytest.fixture
def arrays(shared):
    with np.load(shared / "golden" / "adet_fcos.npz") as file:
        return {name: file[name] for name in file.files}


def test_all_arrays(tool, shared, arrays, capsys):
    assert tool.main([str(shared / "golden" / "adet_fcos.npz")]) == tool.PASS
    output = capsys.readouterr().out
    read = ("image", "gt/", "keys", "fn/ious/pred", "fn/ious/target")
    inputs = {name for name in arrays if name.startswith(read)}
    assert set(compared(output, "pass")) == set(arrays) - inputs and "not used" not in output


def only(arrays, *kept):
    """A small fixture: the inputs and what is asked for."""
    always = ("keys", "image", "gt/", "eval/head", "fn/", "train/default/loss", "targets/default")
    return {name: value for name, value in arrays.items() if name.startswith((*always, *kept))}


@pytest.mark.parametrize(
    "name, change",
    [
        ("eval/head/reg1", lambda x: x + 3e-4),
        ("train/default/loss_fcos_loc", lambda x: x * 1.0005),
        ("targets/default/labels0", lambda x: np.roll(x, 1)),
        ("targets/default/reg1", lambda x: x + (x > 0) * 1e-3),
        ("eval/default/img1/pred_boxes", lambda x: x + 0.01),
        ("eval/default/img0/pred_classes", lambda x: (x + 1) % 5),
    ],
)
def test_a_wrong_array_is_found(tool, arrays, tmp_path, capsys, name, change):
    arrays = only(arrays, "eval/default")
    arrays[name] = change(arrays[name])
    assert tool.main([write(tmp_path, arrays)]) == tool.FAIL
    assert name in compared(capsys.readouterr().out, "FAIL")


def test_detections_in_another_order(tool, arrays, tmp_path):
    arrays = only(arrays, "eval/default")
    for name in [n for n in arrays if n.startswith("eval/default/img0/") and "image_size" not in n]:
        arrays[name] = arrays[name][::-1]
    assert tool.main([write(tmp_path, arrays)]) == tool.PASS


@pytest.mark.parametrize("name", ["train/other/loss_fcos_cls", "eval/other/img0/scores"])
def test_an_unknown_variant(tool, arrays, tmp_path, capsys, name):
    arrays = {**only(arrays), name: np.zeros(1)}
    assert tool.main([write(tmp_path, arrays)]) == tool.UNREADABLE
    assert "['other']; known are ['default'" in capsys.readouterr().err


def test_keys_of_another_model(tool, arrays, tmp_path, capsys):
    arrays = only(arrays)
    arrays["keys"] = np.array(str(arrays["keys"]).replace("ctrness", "centerness"))
    assert tool.main([write(tmp_path, arrays)]) == tool.UNREADABLE
    assert "is of a model with other keys or shapes than ours" in capsys.readouterr().err
