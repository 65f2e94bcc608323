"""Find a config by name: those that come with distill_d2, then those of detectron2's model zoo."""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def available_configs() -> list[str]:
    """The names that ``get_config_file`` finds, e.g. "Distillation-PKD/....yaml", sorted."""
    return sorted(_files())


def get_config_file(name: str) -> str:
    """The absolute path of a packaged config.

    Args:
        name: its path below configs/, e.g. "COCO-Detection/retinanet_R_50_FPN_1x.yaml"; a leading
            "configs/" is ignored. Where distill_d2 has no config of that name, detectron2's is taken.

    Raises:
        FileNotFoundError: neither has it; the message lists names that are close.
    """
    path = _find_packaged(name)
    if path is None:
        raise FileNotFoundError(f"there is no packaged config '{name}'.{_close_names(name)}")
    return path


def find_config(
    path_or_name: str, relative_to: str | Sequence[str] | None = None, *, current_folder: bool = True
) -> str:
    """The absolute path of a config file: a path, or the name of a packaged config.

    Args:
        path_or_name: an absolute path, a path from the current folder or from ``relative_to``, or a
            name for ``get_config_file``; the first of these that exists.
        relative_to: the folder, or folders, of the config that names this one, if any.
        current_folder: False: paths from the current folder are not meant.

    Raises:
        FileNotFoundError: none exists; the message lists the folders tried and names that are close.
    """
    path = os.path.expanduser(path_or_name)
    folders = [os.getcwd()] if current_folder else []
    named = [relative_to] if isinstance(relative_to, str) else relative_to or []
    folders += [os.path.abspath(folder) for folder in named]
    # An absolute path stays as it is.
    candidates = [os.path.normpath(os.path.join(folder, path)) for folder in folders or [os.getcwd()]]
    for candidate in candidates:
        if os.path.isfile(candidate):
            return candidate
    packaged = _find_packaged(path_or_name)
    if packaged is not None:
        return packaged
    for candidate in candidates:
        if os.path.isdir(candidate):
            raise FileNotFoundError(
                f"config '{path_or_name}' is a folder ({candidate}); expected a file."
                f"{_proposal(sorted(_config_files(candidate, path_or_name)))}"
            )
    tried = (
        ["the path itself"]
        if os.path.isabs(path)
        else list(dict.fromkeys([*folders, *map(str, _folders())]))
    )
    raise FileNotFoundError(
        f"config '{path_or_name}' does not exist; tried: {', '.join(tried)}."
        f"{_close_files(path_or_name, candidates) or _close_names(path_or_name)}"
    )


def _folders() -> list[Path]:
    """The folders of packaged configs, first choice first."""
    folders = [_PACKAGE / "configs"]  # an installed wheel
    if (_PACKAGE.parent / "setup.py").is_file():  # a checkout, not somebody's site-packages/configs
        folders.append(_PACKAGE.parent / "configs")
    detectron2 = importlib.util.find_spec("detectron2")  # not imported: that takes seconds
    for place in (detectron2 and detectron2.submodule_search_locations) or ():
        folders.append(Path(place).resolve() / "model_zoo" / "configs")
    return [folder for folder in folders if folder.is_dir()]


def _files() -> dict[str, Path]:
    files: dict[str, Path] = {}
    for folder in reversed(_folders()):
        for suffix in ("*.yaml", "*.py"):
            files.update({path.relative_to(folder).as_posix(): path for path in folder.rglob(suffix)})
    return files


def _find_packaged(name: str) -> str | None:
    path = _files().get(name[len("configs/") :] if name.startswith("configs/") else name)
    return None if path is None else str(path)


def _close_names(name: str) -> str:
    return _proposal(difflib.get_close_matches(name, available_configs(), n=3))


def _close_files(path: str, candidates: Sequence[str]) -> str:
    """Files that lie where ``path`` was looked for, and have a name like it."""
    folder = os.path.dirname(path)
    names = [name for tried in candidates for name in _config_files(os.path.dirname(tried), folder)]
    return _proposal(difflib.get_close_matches(path, names, n=3, cutoff=0.7))


def _config_files(folder: str, prefix: str) -> Iterator[str]:
    """The config files in a folder, each after ``prefix``."""
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        if name.endswith((".yaml", ".yml", ".py")):
            yield os.path.join(prefix, name)


def _proposal(names: Sequence[str]) -> str:
    return f" Did you mean {' or '.join(names[:3])}?" if names else ""
