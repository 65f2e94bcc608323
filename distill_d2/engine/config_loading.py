"""A config of yaml files and the command line's KEY VALUE pairs, with its teacher's file and its datasets."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, get_cfg

from .. import model_zoo
from ..config import EXTRA_KEY, add_distill_config, load_yaml
from ..config_files import MOST_FILES, check_chain, read_config
from ..config_values import set_options
from ..data import adopt_coco_datasets, register_builtin_voc, register_custom_datasets, register_shapes
from ..epochs import options_decide
from ..pairs import pairs_of
from ..plugins import complete
from ..teacher import in_official_zoo


def load_config(
    config_file: str,
    opts: Sequence[str] | None = None,
    *,
    train: bool = True,
    need_teacher: bool = False,
) -> CfgNode:
    """The config of a file (a path, or the name of a packaged config) and KEY VALUE, or KEY=VALUE, pairs;
    its datasets are registered.

    The order of precedence, the last wins: defaults, the file with its _BASE_, the files of EXTRA_CFG,
    the pairs. EXTRA_CFG is empty then.

    Args:
        train: False: of DATASETS.CUSTOM, only datasets of DATASETS.TEST are registered; others need not exist.
        need_teacher: a teacher's file that does not exist is an error here, not when the teacher is built.

    Raises:
        FileNotFoundError, OSError, ValueError, KeyError: the message names the key or file, what was found and
            what was expected.
    """
    cfg = get_cfg()
    add_distill_config(cfg)
    opts = pairs_of(opts or [])
    folders = _load_files(cfg, config_file, opts)
    set_options(cfg, [word for i, word in enumerate(opts) if opts[i - i % 2] != EXTRA_KEY])
    options_decide(cfg, opts[::2])
    complete(cfg)
    cfg.EXTRA_CFG = []
    node = cfg.MODEL.DISTILLER
    node.MODEL_LOAD_OFFICIAL = is_official(
        node.MODEL_DISTILLER_CONFIG, node.MODEL_LOAD_OFFICIAL, folders
    )
    if node.MODEL_DISTILLER_CONFIG and not node.MODEL_LOAD_OFFICIAL:
        node.MODEL_DISTILLER_CONFIG = locate_teacher(node.MODEL_DISTILLER_CONFIG, folders, need_teacher)
    register_shapes()
    register_builtin_voc()
    register_custom_datasets(
        [entry for entry in cfg.DATASETS.CUSTOM if train or _is_for_test(cfg, entry)]
    )
    adopt_coco_datasets([*(cfg.DATASETS.TRAIN if train else ()), *cfg.DATASETS.TEST])
    return cfg


def _is_for_test(cfg: CfgNode, entry: Any) -> bool:
    return not isinstance(entry, dict) or entry.get("NAME") in cfg.DATASETS.TEST


def output_dir(config_file: str, opts: Sequence[str]) -> str:
    """OUTPUT_DIR of a config that does not load: of the command line, the file, or the default."""
    values = read_config(config_file).values if config_file else {}
    return option(pairs_of(opts), "OUTPUT_DIR") or values.get("OUTPUT_DIR") or get_cfg().OUTPUT_DIR


def option(opts: Sequence[str], key: str) -> str:
    """The value of a key among KEY VALUE pairs; "" without it."""
    return dict(zip(opts[::2], opts[1::2])).get(key, "")


def is_official(config: str, official: bool, folders: Sequence[str]) -> bool:
    """Whether a teacher's config is that of detectron2's model zoo: MODEL_LOAD_OFFICIAL, unless the zoo has none
    of this name and a file has.

    Args:
        folders: of the configs that name it.
    """
    if not official or in_official_zoo(config):
        return official
    try:
        return not locate_teacher(config, folders, needed=True)
    except FileNotFoundError:
        return True


def locate_teacher(config: str, folders: Sequence[str], needed: bool) -> str:
    """The absolute path of a teacher's config.

    Args:
        config: its path, from one of the folders or from the current one, or the name of a packaged config.
        folders: of the configs that name it.
        needed: False: the name is returned where there is no such file.

    Raises:
        FileNotFoundError: there is no such file; the message lists the folders tried.
    """
    paths = [os.path.join(folder, os.path.expanduser(config)) for folder in folders]
    beside = next(filter(os.path.isfile, paths), config)
    try:
        return model_zoo.find_config(beside, relative_to=folders)
    except FileNotFoundError as error:
        if needed:
            raise FileNotFoundError(
                f"MODEL.DISTILLER.MODEL_DISTILLER_CONFIG (the teacher): {error}"
            ) from error
        return config


def _load_files(cfg: CfgNode, config_file: str, opts: list[str]) -> list[str]:
    """Merge a file, and those of EXTRA_CFG; the folders of all files."""
    folders: list[str] = []
    chain: list[str] = []
    if config_file:
        chain = [model_zoo.find_config(config_file)]
        folders = load_yaml(cfg, chain[0]).folders
    extra = option(opts, EXTRA_KEY)
    if extra:
        set_options(cfg, [EXTRA_KEY, extra if extra.lstrip()[:1] in ("[", "(") else repr([extra])])
    _load_extra(cfg, folders, chain, [])
    return folders


def _load_extra(cfg: CfgNode, folders: list[str], chain: list[str], loaded: list[str]) -> None:
    """Merge the files of EXTRA_CFG, and those that they name there in turn; their folders are appended."""
    for name in cfg.EXTRA_CFG:
        if not isinstance(name, str):
            raise ValueError(f"{EXTRA_KEY} has the entry {name!r}; expected a file")
        try:
            path = model_zoo.find_config(name, relative_to=folders)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{EXTRA_KEY}: {error}") from error
        check_chain(path, chain, EXTRA_KEY)
        loaded.append(path)
        if len(loaded) > MOST_FILES:
            raise ValueError(f"{EXTRA_KEY} names more than {MOST_FILES} files")
        cfg.EXTRA_CFG = []
        folders += [folder for folder in load_yaml(cfg, path).folders if folder not in folders]
        _load_extra(cfg, folders, [*chain, path], loaded)
