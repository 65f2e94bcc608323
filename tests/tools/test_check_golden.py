"""tools/check_golden.py on fixtures computed here, in float64, from the plain formulas."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
SHAPES = {"p3": (2, 3, 7, 5), "p4": (2, 3, 4, 3)}
FORMS = {
    "L2": (lambda d: d**2, lambda d: 2 * d),
    "L1": (np.abs, np.sign),
    "smoothL1": (
        lambda d: np.where(np.abs(d) < 1, d**2 / 2, np.abs(d) - 0.5),
        lambda d: np.clip(d, -1, 1),
    ),
}


def write(folder: Path, arrays: dict[str, np.ndarray], name: str = "fixture.npz") -> str:
    """The path of a new fixture of these arrays."""
    np.savez(folder / name, **arrays)
    return str(folder / name)


def make_arrays(seed=0, shapes=SHAPES, pkd=True, mimic=True):
    """Inputs in float32; losses and gradients in float64 from formulas that share no code with the losses."""
    random = np.random.default_rng(seed)
    student = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    teacher = {name: (random.normal(size=s) * 3 + 1).astype(np.float32) for name, s in shapes.items()}
    arrays = {f"student/{name}": value for name, value in student.items()}
    arrays.update({f"teacher/{name}": value for name, value in teacher.items()})
    if pkd:
        arrays.update(pkd_outputs(student, teacher))
    if mimic:
        for form in FORMS:
            arrays.update(mimic_outputs(student, teacher, form))
    return arrays


def pkd_outputs(student, teacher):
    """1/2 mean |s^ - t^|^2, its gradient through the standardization written out per channel."""
    outputs, total = {}, 0.0
    for name in student:
        s, t = (x[name].astype(np.float64) for x in (student, teacher))
        grad = np.zeros_like(s)
        for channel in range(s.shape[1]):
            x, y = s[:, channel].ravel(), t[:, channel].ravel()
            deviation = x.std(ddof=1)
            x_hat = (x - x.mean()) / (deviation + 1e-6)
            y_hat = (y - y.mean()) / (y.std(ddof=1) + 1e-6)
            total += ((x_hat - y_hat) ** 2).sum() / 2 / s.size
            upstream = (x_hat - y_hat) / s.size
            spread = (x - x.mean()) / ((len(x) - 1) * deviation)
            inner = upstream / (deviation + 1e-6)
            inner -= (upstream * x_hat).sum() / (deviation + 1e-6) * spread
            grad[:, channel] = (inner - inner.mean()).reshape(grad[:, channel].shape)
        outputs[f"pkd/grad/{name}"] = grad
    return {"pkd/loss": np.float64(total), **outputs}


def mimic_outputs(student, teacher, form):
    distance, slope = FORMS[form]
    folder = f"feature_mimic/{form}/none"
    difference = {n: student[n].astype(np.float64) - teacher[n].astype(np.float64) for n in student}
    losses = [distance(d).mean() for d in difference.values()]
    outputs = {f"{folder}/loss": np.float64(np.mean(losses))}
    for name, d in difference.items():
        outputs[f"{folder}/grad/{name}"] = slope(d) / d.size / len(difference)
    return outputs


def test_good_fixture_passes_array_by_array(tool, tmp_path, capsys):
    arrays = make_arrays()
    assert tool.main([write(tmp_path, arrays)]) == 0
    output = capsys.readouterr().out
    outputs = [name for name in arrays if name.startswith(("pkd", "feature_mimic"))]
    assert len(outputs) == 12
    for name in outputs:
        line = next(line for line in output.splitlines() if f"| {name} " in line)
        assert "pass" in line and "FAIL" not in line
    assert "pkd: pass" in output and "feature_mimic: pass" in output


def test_other_sizes_seeds_levels_and_names(tool, tmp_path):
    first = make_arrays(seed=3, shapes={"p2": (1, 4, 9, 2), "p5": (1, 4, 3, 3), "p6": (1, 4, 2, 2)})
    second = make_arrays(seed=4, mimic=False)
    paths = [write(tmp_path, first, "a.npz"), write(tmp_path, second, "whatever_b.npz")]
    assert tool.main(paths) == 0


@pytest.mark.parametrize("name", ["pkd/loss", "pkd/grad/p4", "feature_mimic/L1/none/grad/p3"])
def test_perturbed_array_fails_with_its_error(tool, tmp_path, capsys, name):
    arrays = make_arrays()
    arrays[name] = np.array(arrays[name])
    arrays[name].flat[0] += 0.25
    assert tool.main([write(tmp_path, arrays)]) == 1
    output = capsys.readouterr().out
    assert [line.split()[1] for line in output.splitlines() if line.endswith("| FAIL |")] == [name]
    assert "2.5e-01" in output
    assert f"{name.partition('/')[0]}: FAIL: 1 of" in output


def test_one_bad_file_among_good_ones_fails(tool, tmp_path):
    bad = make_arrays(seed=1)
    bad["pkd/loss"] *= 1.001
    paths = [write(tmp_path, bad, "bad.npz"), write(tmp_path, make_arrays(), "good.npz")]
    assert tool.main(paths) == 1


def test_array_of_another_shape_fails(tool, tmp_path, capsys):
    arrays = make_arrays()
    arrays["pkd/grad/p3"] = arrays["pkd/grad/p3"][:1]
    assert tool.main([write(tmp_path, arrays)]) == 1
    assert "FAIL: the result has shape (2, 3, 7, 5)" in capsys.readouterr().out


def test_not_a_number_where_the_fixture_has_one_fails(tool, tmp_path, capsys):
    arrays = make_arrays()
    arrays["pkd/grad/p3"].flat[0] = np.nan
    assert tool.main([write(tmp_path, arrays)]) == 1
    assert " inf " in capsys.readouterr().out


def test_arrays_that_nothing_reads_are_named(tool, tmp_path, capsys):
    arrays = {**make_arrays(mimic=False), "seed": np.int64(0)}
    assert tool.main([write(tmp_path, arrays)]) == 0
    assert "not used: seed\n" in capsys.readouterr().out
    assert tool.main([write(tmp_path, make_arrays())]) == 0  # two kinds, which use all together
    assert "not used" not in capsys.readouterr().out


def test_unknown_fixture_lists_the_known_kinds(tool, tmp_path, capsys):
    assert tool.main([write(tmp_path, {"something": np.zeros(3)})]) == 2
    error = capsys.readouterr().err
    assert "not a fixture of a known kind" in error and "something" in error
    for kind in ("pkd", "feature_mimic"):
        assert f"  {kind}: student/*, teacher/*" in error


def test_missing_array_is_named(tool, tmp_path, capsys):
    arrays = make_arrays(mimic=False)
    del arrays["pkd/grad/p4"]
    assert tool.main([write(tmp_path, arrays)]) == 2
    assert "has no array 'pkd/grad/p4'" in capsys.readouterr().err


def test_unreadable_files(tool, tmp_path, capsys):
    whole = Path(write(tmp_path, make_arrays()))
    cut, text, array = (tmp_path / name for name in ("cut.npz", "text.npz", "array.npy"))
    pickled, none = tmp_path / "pickled.npz", tmp_path / "none.npz"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    text.write_text("not a fixture")
    np.save(array, np.zeros(2))
    np.savez(pickled, code=np.array([object()], dtype=object))
    for path in (cut, text, array, pickled, none):
        assert tool.main([str(path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"{path}: ") and len(error.splitlines()) == 1
    assert "does not exist" in error


def test_a_new_kind_is_one_registration(tool, tmp_path, capsys):
    import golden

    @golden.golden_kind(holds=["sum_of/*", "twice"], rtol=0.0, atol=0.0)
    def doubling(fixture):
        fixture.compare("twice", 2 * fixture.tensor("sum_of/x"))

    try:
        path = write(tmp_path, {"sum_of/x": np.arange(3), "twice": np.array([0, 2, 4])})
        assert tool.main([path]) == 0
        assert "| twice " in capsys.readouterr().out
        with pytest.raises(ValueError, match="two kinds"):
            golden.golden_kind(holds=["x"], rtol=0.0, atol=0.0)(doubling)
    finally:
        del golden.GOLDEN_KINDS["doubling"]


def test_as_a_program(tmp_path):
    arrays = make_arrays(mimic=False)
    good = write(tmp_path, arrays, "good.npz")
    arrays["pkd/loss"] = arrays["pkd/loss"] + 1
    bad = write(tmp_path, arrays, "bad.npz")
    command = [sys.executable, str(TOOLS / "check_golden.py"), good, bad]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "pkd: pass" in done.stdout and "pkd: FAIL: 1 of 3 arrays" in done.stdout
