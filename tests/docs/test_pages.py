"""What the pages say is understood, and runs.

All pages: `pytest -m "slow or not slow" tests/docs`; one page: `-k docs/start.md`.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import yaml
from detectron2.config import CfgNode, get_cfg
from pages import PAGES, Block, blocks, option, run_bash
from runs import ROOT
from small import SCRIPTS, Small, parse

import distill_d2
from distill_d2.cli import COMMANDS
from distill_d2.commands.arguments import check_config_arguments
from distill_d2.model_zoo import available_configs

LABEL = "not yet run at this size"
LANGUAGES = {"bash", "yaml", "python", "text", "mermaid"}


def write(block: Block, folder: Path) -> None:
    file = folder / block.file
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(block.text)


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_understood(page, tmp_path, monkeypatch):
    """Programs, options, packaged configs, keys; blocks of other languages; labels of what never ran."""
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block.language!r} of a block: expected {LANGUAGES}"
        if block.language == "yaml":
            yaml.safe_load(block.text)
        if block.language == "python":
            compile(block.text, page, "exec")
        if block.file:
            write(block, tmp_path)
        if block.language != "bash":
            continue
        wide = [line for line in block.text.splitlines() if len(line) > 120]
        assert not wide, f"lines of more than 120 characters: {wide}"
        commands: list[list[str]] = []
        run_bash(block.text, tmp_path, lambda words, kept=commands: kept.append(words) or 0)
        for words in commands:
            understand(words)
            if option(words, "--num-gpus") not in (None, "0"):
                assert LABEL in block.text, f"{words}: the block lacks '{LABEL}'"


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.language != "text" for b in blocks(page))]
)
def test_page_runs(page, tmp_path, monkeypatch):
    """On small data, in the order of the page."""
    monkeypatch.chdir(tmp_path)
    small = Small(tmp_path)
    for block in blocks(page):
        if block.file:
            write(block, tmp_path)
        elif block.language == "python":
            (tmp_path / "block.py").write_text(block.text)
            assert small.run(["python", "block.py"]) == 0, block.text
        elif block.language == "bash":
            run_bash(block.text, tmp_path, small.run)


def test_links_of_pages_outside_the_site():
    """mkdocs checks those within docs/."""
    broken = []
    for page in [
        "README.md",
        "datasets/README.md",
        "tests/README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
    ]:
        text = (ROOT / page).read_text(encoding="utf-8")
        for link, _, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#([^)]*))?\)", text):
            target = (ROOT / page).parent / link if link else ROOT / page
            if not target.exists() or anchor and anchor not in anchors(target):
                broken.append(f"{page}: {link}#{anchor}")
    assert broken == []


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def understand(words: list[str]) -> None:
    """Raises if a command of this package would not take these words."""
    if words[0] == "python" and words[1] in SCRIPTS:
        words = ["distill-d2", SCRIPTS[words[1]], *words[2:]]
    if words[0] != "distill-d2" or words[1].startswith("-"):
        return
    assert words[1] in COMMANDS, words
    if "--help" in words:
        return
    args = parse(words[1], words[2:])
    config = option(words, "--config-file") or ""
    if (
        config
        and not Path(config).exists()
        and config.removeprefix("configs/") not in available_configs()
    ):
        assert Path(config).parts[0] in {"output", "distill", "work"}, (
            f"{config} is neither packaged nor on the page"
        )
        args.config_file, args.needs_config = "", False
    check_config_arguments(args)
    if not config.endswith(".py"):
        opts = list(getattr(args, "opts", None) or [])
        names = [word.partition("=")[0] for word in opts if "=" in word] or opts[::2]
        unknown = [name for name in names if not known(name)]
        assert not unknown, f"{words}: no keys {unknown}"


def known(name: str) -> bool:
    """Whether this is a config key."""
    node = all_keys()
    for part in name.split("."):
        if not isinstance(node, CfgNode) or part not in node:
            return False
        node = node[part]
    return True


@functools.cache
def all_keys() -> CfgNode:
    cfg = get_cfg()
    distill_d2.add_distill_config(cfg)
    return cfg
