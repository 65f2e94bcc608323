"""Read a yaml config with the files that it inherits from through ``_BASE_``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from . import model_zoo
from .epochs import file_decides
from .safe_yaml import read_yaml_file

BASE_KEY = "_BASE_"
MOST_FILES = 100


@dataclass
class ConfigFiles:
    """The content of a yaml config and of the files that it inherits from.

    Attributes:
        path: of the config.
        values: of all files; those of a file replace those of its ``_BASE_``.
        files: the path of each file with its own values, the config itself first.
    """

    path: str
    values: dict[str, Any] = field(default_factory=dict)
    files: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    @property
    def folders(self) -> list[str]:
        """The folders of the files, without repetition."""
        return list(dict.fromkeys(os.path.dirname(path) for path, _ in self.files))

    def naming(self, key: str) -> str:
        """The files as a message names them: the one that sets ``key``, a dotted name."""
        setting = next((path for path, own in self.files if _has(own, key)), self.path)
        inherited = "" if setting == self.path else f" (a {BASE_KEY} of '{self.path}')"
        return f"config file '{setting}'{inherited}"


def read_config(path: str) -> ConfigFiles:
    """Read a yaml file and its ``_BASE_``: one or a list of paths, relative to the file's folder, of addresses,
    or of names of packaged configs.

    Raises:
        FileNotFoundError, OSError: a file does not exist or cannot be read.
        ValueError: a file is not yaml (see ``read_yaml``), is empty, has something else than keys, or
            inherits from itself.
    """
    content = ConfigFiles(os.path.abspath(path))
    content.values = _read(content.path, (), content)
    return content


def check_chain(path: str, chain: Sequence[str], key: str) -> None:
    """Raises ValueError if a file is in the chain of files that name each other in ``key``."""
    if os.path.realpath(path) in map(os.path.realpath, chain):
        raise ValueError(f"config files include themselves through {key}: {' -> '.join([*chain, path])}")


def _read(path: str, chain: tuple[str, ...], content: ConfigFiles) -> dict[str, Any]:
    check_chain(path, chain, BASE_KEY)
    if len(content.files) >= MOST_FILES:
        raise ValueError(
            f"config file '{content.path}' inherits from more than {MOST_FILES} files through {BASE_KEY}"
        )
    own = _own_values(path)
    content.files.append((path, own))
    file_decides(own, f"config file '{path}'")
    values: dict[str, Any] = {}
    for name in _bases(own.pop(BASE_KEY, []), path):
        base = _find_base(name, path)
        _merge(_read(base, (*chain, path), content), values, base)
    _merge(own, values, path)
    return values


def _own_values(path: str) -> dict[str, Any]:
    try:
        values = read_yaml_file(path)
    except ValueError as error:
        raise ValueError(f"{error}{_packaged_instead(path)}") from error
    if values is None:
        raise ValueError(f"config file '{path}' is empty")
    if not isinstance(values, dict):
        raise ValueError(
            f"config file '{path}' holds {'a list' if isinstance(values, list) else repr(values)[:80]}; expected "
            "keys and values, such as MODEL: {WEIGHTS: model.pth}"
        )
    return values


def _packaged_instead(path: str) -> str:
    names = [
        name
        for name in model_zoo.available_configs()
        if os.path.basename(name) == os.path.basename(path)
    ]
    fitting = [name for name in names if path.endswith(f"/{name}")] or names
    packaged = [name for name in fitting if model_zoo.get_config_file(name) != path]
    return f". A packaged config of that name can be used instead: {packaged[0]}" if packaged else ""


def _bases(value: Any, path: str) -> list[str]:
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError(
            f"config file '{path}': {BASE_KEY} is {value!r}; expected a file, or a list of files"
        )
    return names


def _find_base(name: str, path: str) -> str:
    try:
        if "://" in name:
            from detectron2.utils.file_io import PathManager  # imports torch

            return PathManager.get_local_path(name)
        return model_zoo.find_config(name, relative_to=os.path.dirname(path), current_folder=False)
    except Exception as error:  # a download may raise anything
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
        raise kind(f"config file '{path}', {BASE_KEY}: {error}") from error


def _merge(values: dict[str, Any], into: dict[str, Any], path: str) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and key in into:
            if not isinstance(into[key], dict):
                raise ValueError(
                    f"config file '{path}': {key} holds keys here, but a value in a {BASE_KEY}"
                )
            _merge(value, into[key], path)
        else:
            into[key] = value


def _has(values: Any, key: str) -> bool:
    for name in key.split("."):
        if not isinstance(values, dict) or name not in values:
            return False
        values = values[name]
    return True
