"""tools/compatibility.py: every cell of its table, and the table in README.md."""

from pathlib import Path

import compatibility
import pytest
import torch

from distill_d2 import DISTILL_LOSS_REGISTRY, DistillLoss
from distill_d2.testing.family import families

ROOT = Path(__file__).resolve().parents[2]
CELLS = [(loss, name) for loss in compatibility.losses() for name in families()]
# Losses on features work with every detector; of the others those that have what they read.
NEED = {"HeadKD": ("R-CNN",), "SSDKD": ("R-CNN", "SSD")}
_REFUSALS = {}


@pytest.mark.parametrize("loss, name", CELLS)
def test_cell(loss, name):
    """A step works, or the refusal says which loss, which detector, and what is missing."""
    reason = _REFUSALS[loss, name] = compatibility.refusal(loss, families()[name])
    works = loss not in NEED or any(part in name for part in NEED[loss])
    if loss in ("DeFeat", "GID", "FGFI") and reason:
        assert name == "SOLOv2"  # without boxes
    else:
        assert (reason == "") == works, reason
    if reason:
        assert "MODEL.DISTILLER." in reason and type(families()[name].build(8)).__name__ in reason


def test_table_of_the_page():
    """All cells ran before; a change of any is made known by tools/compatibility.py --write."""
    if set(_REFUSALS) != set(CELLS):
        pytest.skip("needs all cells, which this run has left out")
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert compatibility.with_table(page, compatibility.table(_REFUSALS)) == page


class Wrong(DistillLoss):
    """Does not depend on the student, or is not finite, or fails in the step."""

    NODE = "PKD"
    value = float("nan")

    def __init__(self, **_settings):
        super().__init__()

    def forward(self, student, teacher, batch):
        if self.value is None:
            raise ValueError("in the step")
        return {"loss_wrong": torch.tensor(self.value, requires_grad=True) * 1.0}


@pytest.mark.parametrize(
    "value, error", [(float("nan"), AssertionError), (1.0, AssertionError), (None, ValueError)]
)
def test_what_is_no_refusal(monkeypatch, value, error):
    monkeypatch.setattr(Wrong, "value", value)
    monkeypatch.setattr(compatibility, "configured", lambda _name, _family: Wrong())
    with pytest.raises(error):
        compatibility.refusal("Wrong", families()["RetinaNet"])
    assert "Wrong" not in [name for name, _ in DISTILL_LOSS_REGISTRY]


def test_pages():
    start, end = compatibility.MARKERS
    page = f"a\n{start}old\n{end}b\n"
    assert compatibility.with_table(page, "new") == f"a\n{start}new\n{end}b\n"
    for wrong in ("a\n", f"a\n{start}b\n", f"{end}{start}"):
        with pytest.raises(ValueError, match="has no <!-- compatibility --> with <!-- /compat"):
            compatibility.with_table(wrong, "new")


def test_program(monkeypatch, tmp_path, capsys):
    start, end = compatibility.MARKERS
    page = tmp_path / "README.md"
    page.write_text(f"a\n{start}{end}b\n")
    monkeypatch.setattr(compatibility, "README", page)
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
