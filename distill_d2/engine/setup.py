"""From command-line arguments to a complete, checked config."""

from __future__ import annotations

import ast
import difflib
import functools
import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from .. import model_zoo
from ..config import add_distill_config, dump, load_yaml, student_config
from ..data import check_datasets, register_builtin_voc, register_custom_datasets, register_shapes
from ..evaluation import evaluator_kind
from ..imports import check_note, imported, write_note
from ..losses import build_losses
from ..plugins import of_student
from ..rules import type_message
from .key_rules import check_keys

logger = logging.getLogger(__name__)


def setup(args: Any, distill: bool) -> CfgNode:
    """Load, complete and check the config; start logging to OUTPUT_DIR. Call it in every process.

    The order of precedence, the last wins: defaults, --config-file with its _BASE_, the files of
    EXTRA_CFG, the command line's KEY VALUE pairs.

    Args:
        args: of ``argument_parser``.
        distill: wrap the config's model in the Distiller; False (or --eval-only): the student alone.

    Raises:
        FileNotFoundError, ValueError, KeyError: the message names the key or file,
            what was found and what was expected.
    """
    args.config_file = model_zoo.find_config(args.config_file) if args.config_file else ""
    try:
        cfg = load_config(args.config_file, args.opts)
    except KeyError:
        check_note(_output_dir(args))  # a module that --import does not name may bring the key
        raise
    if args.resume or args.eval_only:
        check_note(cfg.OUTPUT_DIR)
    cfg.MODEL.DEVICE = choose_device(cfg.MODEL.DEVICE, args.num_gpus)
    cfg = _with_distiller(cfg) if distill and not args.eval_only else student_config(cfg)
    check_keys(cfg, train=not args.eval_only)
    if cfg.MODEL.META_ARCHITECTURE == "Distiller":
        build_losses(cfg.MODEL.DISTILLER)  # raises for wrong settings of losses
    _check_batch(cfg.SOLVER.IMS_PER_BATCH)
    check_output_dir(cfg.OUTPUT_DIR, "OUTPUT_DIR")
    cfg.freeze()
    default_setup(cfg, args)
    if comm.is_main_process():
        _write_config(cfg)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="distill_d2")
    note_imports(cfg.OUTPUT_DIR, args.imports)
    for detector in of_student(cfg):
        detector.check(cfg)
    if comm.is_main_process():
        check_datasets(cfg, train=not args.eval_only)
        for name in cfg.DATASETS.TEST:
            evaluator_kind(name)  # raises if there is no evaluator for it
    comm.synchronize()
    return cfg


def load_config(config_file: str, opts: list[str] | None = None) -> CfgNode:
    """The config of a file (a path, or the name of a packaged config) and KEY VALUE pairs; its
    datasets are registered.

    Raises:
        FileNotFoundError, ValueError, KeyError: see ``setup``.
    """
    cfg = get_cfg()
    add_distill_config(cfg)
    path = model_zoo.find_config(config_file) if config_file else ""
    if path:
        load_yaml(cfg, path)
    opts = list(opts or [])
    extra_cfg = _option(opts, "EXTRA_CFG")
    if extra_cfg:
        _merge_opts(cfg, ["EXTRA_CFG", extra_cfg])
    extra = [model_zoo.find_config(f, relative_to=os.path.dirname(path)) for f in cfg.EXTRA_CFG]
    for file in extra:
        load_yaml(cfg, file)
    _merge_opts(cfg, opts)
    _locate_teacher(cfg, [path, *extra])
    register_shapes()
    register_builtin_voc()
    register_custom_datasets(cfg.DATASETS.CUSTOM)
    return cfg


def _output_dir(args: Any) -> str:
    """OUTPUT_DIR of a config that does not load: of the command line, the file, or the default."""
    of_file = CfgNode.load_yaml_with_base(args.config_file) if args.config_file else {}
    return _option(args.opts or [], "OUTPUT_DIR") or of_file.get("OUTPUT_DIR") or get_cfg().OUTPUT_DIR


def _option(opts: Sequence[str], key: str) -> str:
    """The value of a key among KEY VALUE pairs; "" without it."""
    return dict(zip(opts[::2], opts[1::2])).get(key, "")


def _with_distiller(cfg: CfgNode) -> CfgNode:
    if cfg.MODEL.META_ARCHITECTURE != "Distiller":
        cfg.MODEL.DISTILLER.STUDENT_META_ARCH = cfg.MODEL.META_ARCHITECTURE
        cfg.MODEL.META_ARCHITECTURE = "Distiller"
    student_config(cfg)  # raises if STUDENT_META_ARCH is empty
    return cfg


def _merge_opts(cfg: CfgNode, opts: list[str]) -> None:
    if len(opts) % 2:
        raise ValueError(f"the command line's KEY VALUE pairs are incomplete: {opts}")
    known = set(config_keys(cfg))
    unknown = [key for key in opts[::2] if key not in known]
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, n=3)
        raise KeyError(f"unknown config key '{unknown[0]}'; the closest are {close}")
    for key, value in zip(opts[::2], opts[1::2]):
        try:
            _merge(cfg, key, value)
        except ValueError as error:
            raise ValueError(type_message(error)) from error


def _merge(cfg: CfgNode, key: str, value: str) -> None:
    node = functools.reduce(getattr, key.split("."), cfg)
    if isinstance(node, CfgNode):
        node.merge_from_other_cfg(_read_node(key, value))
    else:
        cfg.merge_from_list([key, value])


def _read_node(key: str, text: str) -> CfgNode:
    """The value of a whole node, such as "{betas: [0.9, 0.99]}"."""
    try:
        values = _literal(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{key} is '{text}'; expected {{name: value, ...}}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{key} is '{text}'; expected {{name: value, ...}}")
    return CfgNode(values)


def _literal(text: str) -> Any:
    """A Python literal, as yacs reads values on the command line, or yaml."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return yaml.safe_load(text)


def config_keys(node: CfgNode, prefix: str = "") -> list[str]:
    """The dotted names of all keys of a node, each after ``prefix``."""
    keys = []
    for name, value in node.items():
        keys.append(prefix + name)
        if isinstance(value, CfgNode):
            keys += config_keys(value, f"{prefix}{name}.")
    return keys


def _locate_teacher(cfg: CfgNode, config_files: list[str]) -> None:
    """Make a teacher file that one of the configs names absolute: later code does not know them."""
    node = cfg.MODEL.DISTILLER
    if node.MODEL_LOAD_OFFICIAL or not node.MODEL_DISTILLER_CONFIG:
        return
    folders = [folder for file in config_files for folder in _config_folders(file)]
    node.MODEL_DISTILLER_CONFIG = file_in(folders, node.MODEL_DISTILLER_CONFIG)


def file_in(folders: Iterable[str], name: str) -> str:
    """The absolute path of the file ``name`` in the first folder that has it; otherwise the name."""
    paths = (os.path.abspath(os.path.join(folder, name)) for folder in folders)
    return next((path for path in paths if os.path.isfile(path)), name)


def _config_folders(config_file: str) -> list[str]:
    """The folders of a config file and, through _BASE_, of those it inherits from."""
    folders = []
    while config_file and os.path.isfile(config_file):
        folders.append(os.path.dirname(os.path.abspath(config_file)))
        base = _base_of(config_file)
        config_file = os.path.join(folders[-1], os.path.expanduser(base)) if base else ""
    return folders


def _base_of(config_file: str) -> str:
    with open(config_file) as file:
        base = (yaml.safe_load(file) or {}).get("_BASE_", "")
    return base if isinstance(base, str) else ""


def choose_device(device: str, num_gpus: int) -> str:
    """The device to train on: a config's "cuda" means the CPU with --num-gpus 0.

    Raises:
        ValueError: torch knows no such device, or no GPU is available.
    """
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"MODEL.DEVICE is {device!r}; expected 'cuda', 'cpu' or another of torch"
        ) from error
    if kind != "cuda" or torch.cuda.is_available():
        return device
    if num_gpus == 0:
        return "cpu"
    raise ValueError(
        f"--num-gpus {num_gpus} and device '{device}', but torch sees no GPU; for the CPU use "
        "--num-gpus 0"
    )


def _write_config(cfg: CfgNode) -> None:
    """Write OUTPUT_DIR/config.yaml as detectron2 does, with comments."""
    with open(os.path.join(cfg.OUTPUT_DIR, "config.yaml"), "w") as file:
        file.write(dump(cfg))


def note_imports(folder: str, names: Sequence[str]) -> None:
    """Log what users' modules were imported, and note those of --import beside the run's config."""
    for line in imported():
        logger.info(f"Imported {line}")
    if comm.is_main_process():
        write_note(folder, names)


def check_output_dir(path: str, key: str) -> None:
    """Create the folder. Raises OSError if nothing can be written to it."""
    try:
        os.makedirs(path, exist_ok=True)
        probe = os.path.join(path, f".writable-{os.getpid()}")
        with open(probe, "w"):
            pass
        os.remove(probe)
    except OSError as error:
        raise OSError(f"{key} '{path}' cannot be written to: {error}") from error


def _check_batch(images: int) -> None:
    processes = comm.get_world_size()
    if images < processes or images % processes:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {images}; expected a multiple of the {processes} processes"
        )
