"""tools/compatibility.py, and the table in docs/which_method.md. tests/laws takes a step of every cell."""

from pathlib import Path

import compatibility
import pytest

from distill_d2.testing import Cell, families, recipes

ROOT = Path(__file__).resolve().parents[2]


def test_table_of_the_page():
    """A change is made known by tools/compatibility.py --write. Refusals name the loss and the detector."""
    refusals = {
        (loss, name): Cell.of_recipe(recipes()[loss], family).refusal
        for loss in compatibility.losses()
        for name, family in families().items()
    }
    page = (ROOT / "docs" / "which_method.md").read_text(encoding="utf-8")
    assert compatibility.with_table(page, compatibility.table(refusals)) == page
    detectors = {name: type(family.build(8)).__name__ for name, family in families().items()}
    for (loss, name), reason in refusals.items():
        assert not reason or ("MODEL.DISTILLER." in reason and detectors[name] in reason), loss
    assert compatibility.refusal("PKD", families()["RetinaNet"]) == ""  # it takes a step
    assert "HEAD_KD" in compatibility.refusal("HeadKD", families()["RetinaNet"])


def test_pages():
    start, end = compatibility.MARKERS
    page = f"a\n{start}old\n{end}b\n"
    assert compatibility.with_table(page, "new") == f"a\n{start}new\n{end}b\n"
    for wrong in ("a\n", f"a\n{start}b\n", f"{end}{start}"):
        with pytest.raises(ValueError, match="has no <!-- compatibility --> with <!-- /compat"):
            compatibility.with_table(wrong, "new")


def test_program(monkeypatch, tmp_path, capsys):
    start, end = compatibility.MARKERS
    page = tmp_path / "page.md"
    page.write_text(f"a\n{start}{end}b\n")
    monkeypatch.setattr(compatibility, "PAGE", page)
    refusals = {(loss, "X"): "why not" if loss == "HeadKD" else "" for loss in compatibility.losses()}
    monkeypatch.setattr(compatibility, "all_refusals", lambda: refusals)
    compatibility.main([])
    printed = capsys.readouterr().out
    assert "why not" not in printed and page.read_text() == f"a\n{start}{end}b\n"
    compatibility.main(["--reasons", "--write"])
    assert capsys.readouterr().out == f"{printed}HeadKD, X: why not\n\n"
    assert page.read_text() == f"a\n{start}{printed}{end}b\n"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines()]
    assert rows[0] == ["", "X"] and ["`HeadKD`", "no"] in rows and ["`PKD`", "yes"] in rows
