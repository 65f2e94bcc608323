"""tools/check_golden.py on recorded fixtures of POTO."""

import json
import zlib

import numpy as np
import pytest
from golden_tool import compared, write

INPUTS = ("image", "gt/")


@pytest.fixture
def arrays(shared):
    with np.load(shared / "golden" / "adet_poto.npz") as recorded:
        return {name: recorded[name] for name in recorded.files}


def is_compared(name):
    return not name.startswith(INPUTS) and not name.endswith("/keys")


def test_recorded_fixture(tool, shared, arrays, capsys):
    assert tool.main([str(shared / "golden" / "adet_poto.npz")]) == 0
    output = capsys.readouterr().out
    assert "adet_poto: pass" in output and "not used" not in output
    assert set(compared(output, "pass")) == set(filter(is_compared, arrays))


def test_every_changed_array_fails(tool, tmp_path, arrays, capsys):
    """Of a fixture of one network."""
    arrays = {n: a for n, a in arrays.items() if n.startswith(("poto_3dmf_aux/", *INPUTS))}
    changed = {name: np.array(array) for name, array in arrays.items()}
    for name, array in changed.items():
        if is_compared(name):
            array.flat[0] += 1 if array.dtype.kind == "i" else 0.01
    assert tool.main([write(tmp_path, changed)]) == 1
    assert set(compared(capsys.readouterr().out, "FAIL")) == set(filter(is_compared, arrays))


def test_parameter_that_the_network_has_not(tool, tmp_path, arrays):
    keys = json.loads(str(arrays["poto/keys"]))
    arrays = {n: a for n, a in arrays.items() if n.startswith(("poto/", *INPUTS))}
    arrays["poto/keys"] = np.array(json.dumps({**keys, "head.ctrness.bias": [1]}))
    with pytest.raises(RuntimeError, match="Unexpected key.*head.ctrness.bias"):
        tool.main([write(tmp_path, arrays)])


@pytest.mark.parametrize(
    "name, shape, first",
    [
        ("backbone.bottom_up.stem.conv1.weight", (16, 3, 7, 7), lambda z: z * 0.005 * (2 / 147) ** 0.5),
        ("head.cls_subnet.1.weight", (64,), lambda z: 1 + 0.1 * z),
        ("backbone.bottom_up.res2.0.conv3.norm.weight", (8,), lambda z: 0.25 * (1 + 0.1 * z)),
        ("head.scales.1.scale", (1,), lambda z: 1 + 0.1 * z),
        ("head.cls_score.bias", (5,), lambda z: 0.1 * z - 3),
        ("head.bbox_pred.bias", (4,), lambda z: 0.1 * z + 2),
        ("head.filter.bias", (1,), lambda z: 0.1 * z),
        ("backbone.bottom_up.stem.conv1.norm.running_mean", (4,), lambda z: 0.1 * z),
        ("backbone.bottom_up.stem.conv1.norm.running_var", (4,), lambda _: 1.0),
    ],
)
def test_recipe(tool, name, shape, first):
    from golden.adet_poto import by_recipe

    z = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(shape)
    found = by_recipe(name, shape)
    assert found.shape == shape
    assert found.flatten()[0].item() == pytest.approx(first(z.flat[0]), rel=1e-6)
