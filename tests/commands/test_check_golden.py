"""distill-d2 check-golden on fixtures of two small kinds; tests/test_golden.py has the real ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distill_d2 import cli, golden

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture(autouse=True)
def kinds(monkeypatch):
    """A new kind is one registration."""
    monkeypatch.setattr(golden, "GOLDEN_KINDS", dict(golden.load_kinds()))

    @golden.golden_kind(holds=["in/*", "doubled/*"], rtol=1e-5, atol=1e-7)
    def doubling(fixture):
        for name in fixture.names("in/*"):
            fixture.compare(f"doubled/{name[3:]}", 2 * fixture.tensor(name))

    @golden.golden_kind(holds=["in/*", "total"], rtol=0.1, atol=0.0)
    def adding(fixture):
        fixture.compare("total", sum(fixture.tensor(name).sum() for name in fixture.names("in/*")))

    with pytest.raises(ValueError, match="two kinds of golden fixtures named 'adding'"):
        golden.golden_kind(holds=["x"], rtol=0.0, atol=0.0)(adding)


def arrays(total=True):
    result = {"in/p3": np.arange(1.0, 7).reshape(2, 3), "in/p4": np.ones((1, 2))}
    result.update({f"doubled/{name[3:]}": 2 * value for name, value in result.items()})
    return {**result, "total": np.float64(23)} if total else result


def check(folder, *fixtures):
    """The exit status for files of these arrays."""
    paths = [folder / f"{index}.npz" for index in range(len(fixtures))]
    for path, content in zip(paths, fixtures):
        np.savez(path, **content)
    return cli.main(["check-golden", *map(str, paths)])


def test_good_fixtures_pass_array_by_array(tmp_path, capsys):
    assert check(tmp_path, arrays(), {**arrays(total=False), "seed": np.int64(0)}) == 0
    output = capsys.readouterr().out
    assert output.count("doubling: pass") == 2 and output.count("adding: pass") == 1
    lines = [line.split() for line in output.splitlines()]
    passed = [line[1] for line in lines if line[-2:] == ["pass", "|"]]
    assert passed == ["doubled/p3", "doubled/p4", "total", "doubled/p3", "doubled/p4"]
    assert output.count("not used") == 1 and "1.npz: not used: seed\n" in output


@pytest.mark.parametrize(
    "name, change, texts",
    [
        ("doubled/p3", 0.25, ["| 2.5e-01 ", "| 1.1e-01 ", "doubling: FAIL: 1 of 2 arrays"]),
        ("doubled/p4", np.nan, [" inf ", "doubling: FAIL: 1 of 2 arrays", "adding: pass"]),
        ("total", 3.0, ["| 3.0e+00 ", "doubling: pass", "adding: FAIL: 1 of 1 arrays"]),
    ],
)
def test_changed_array_fails_with_its_error(tmp_path, capsys, name, change, texts):
    """A good file after it does not hide it."""
    wrong = arrays()
    wrong[name] = np.array(wrong[name])
    wrong[name].flat[0] += change
    assert check(tmp_path, wrong, arrays()) == 1
    output = capsys.readouterr().out
    assert [line.split()[1] for line in output.splitlines() if line.endswith("| FAIL |")] == [name]
    assert all(text in output for text in texts), output
    assert check(tmp_path, {**wrong, name: wrong[name][None]}) == 1
    assert f"FAIL: the result has shape {arrays()[name].shape}" in capsys.readouterr().out


def test_files_that_are_no_fixtures(tmp_path, capsys):
    assert check(tmp_path, {"something": np.zeros(3)}) == 2
    error = capsys.readouterr().err
    assert "not a fixture of a known kind" in error and error.endswith("It holds something\n")
    assert "  doubling: in/*, doubled/*\n" in error and "  pkd: student/*, teacher/*" in error
    incomplete = arrays()
    del incomplete["doubled/p4"]
    assert check(tmp_path, arrays(), incomplete) == 2
    assert "1.npz: has no array 'doubled/p4'" in capsys.readouterr().err


def test_unreadable_files(tmp_path, capsys):
    check(tmp_path, arrays())
    content = (tmp_path / "0.npz").read_bytes()
    names = ("cut.npz", "text.npz", "array.npy", "pickled.npz", "none.npz")
    cut, text, array, pickled, none = paths = [tmp_path / name for name in names]
    cut.write_bytes(content[: len(content) // 2])
    text.write_text("not a fixture")
    np.save(array, np.zeros(2))
    np.savez(pickled, code=np.array([object()], dtype=object))
    capsys.readouterr()
    for path in paths:
        assert cli.main(["check-golden", str(path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"{path}: ") and len(error.splitlines()) == 1
    assert f"{none}: does not exist\n" == error


def test_as_a_program(tmp_path):
    random = np.random.default_rng(0)
    maps = {f"{role}/p3": random.normal(size=(2, 3, 7, 5)) for role in ("student", "teacher")}
    np.savez(tmp_path / "wrong.npz", **maps, **{"pkd/loss": 9.0, "pkd/grad/p3": maps["student/p3"]})
    command = [sys.executable, str(TOOLS / "check_golden.py"), str(tmp_path / "wrong.npz")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "pkd: FAIL: 2 of 2 arrays" in done.stdout, done.stderr
