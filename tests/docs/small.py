"""Runs the commands of a page on data and detectors that are small enough for a test."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn
from unittest import mock

import torch
import yaml
from detectron2.config import LazyConfig
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.modeling import build_model
from pages import option
from pool import start_script
from runs import ROOT
from small_datasets import write_voc

from distill_d2.data.shapes import SPLITS, generate_shapes
from distill_d2.engine import config_loading
from distill_d2.model_zoo import find_config
from distill_d2.testing import write_dataset

#: Programs that a test cannot run, and what covers them.
NOT_RUN = {
    "pip": "tests/test_packaging.py builds and installs the wheel",
    "make": "it runs this test",
    "mkdocs": "make docs",
    "docker": "no daemon; tests/test_packaging.py compares the steps",
    "git": "no remote repository",
    "torchrun": "tests/engine/test_started_processes.py",
    "srun": "tests/engine/test_started_processes.py",
    "datasets": "downloads; tests/data/test_download_scripts.py",
    "export": "the shell's own",
}
#: Commands of distill-d2, too.
ALSO_NOT_RUN = {
    "install-detectron2": "tests/commands/test_install_detectron2.py",
    "convert": "needs checkpoints of other programs; tests/commands/test_convert_*.py",
    "check-golden": "needs recorded arrays; tests/commands/test_check_golden.py",
}
MODULE = "import runpy, sys\ndel sys.argv[0]\nrunpy.run_module(sys.argv[0], None, '__main__', True)\n"
#: Scripts of a checkout, and the commands that take the same options.
SCRIPTS = {"train_distill.py": "train", "train_baseline.py": "baseline"}
MAIN = "import sys\nfrom distill_d2.cli import main\nif __name__ == '__main__':\n    sys.exit(main())\n"
#: For every detector of a page.
NARROW = {
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 8,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
}
SHORT = {
    "INPUT.MIN_SIZE_TRAIN": "(64,)",
    "INPUT.MIN_SIZE_TEST": 64,
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.BASE_LR": 1e-6,
    "SOLVER.CLIP_GRADIENTS.ENABLED": True,  # of random weights without a norm they are huge
    "SOLVER.STEPS": "()",
    "SOLVER.EPOCHS": 0.0,
    "SOLVER.MAX_ITER": 2,
    "SOLVER.WARMUP_ITERS": 0,
    "SOLVER.CHECKPOINT_EPOCHS": 0.0,
    "TEST.EVAL_EPOCHS": 0.0,
    "TEST.EVAL_PERIOD": 0,
    "MODEL.DISTILLER.BYPASS_DISTILL": 0,
    "MODEL.DISTILLER.PRETRAIN_TEACHER_ITERS": 0,
}
#: Values of options.
SMALLER = {"--num-gpus": "0", "--device": "cpu", "--rounds": "1"}
#: The classes of data/cards, of which a few have objects.
CARDS = ["nine", "ten", "jack", "queen", "king", "ace"]
#: ICD, which else starts later, teaches in so short a run, too.
DEMO = ["SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2", "MODEL.DISTILLER.BYPASS_DISTILL", "0"]
LAZY = ["train.max_iter=2", "train.init_checkpoint=", "dataloader.train.total_batch_size=2"]
LAZY += [f"dataloader.{part}.num_workers=0" for part in ("train", "test")]
LAZY += [f"dataloader.{part}.mapper.augmentations.0.short_edge_length=64" for part in ("train", "test")]


class Small:
    """The folder of a page, its data, and the runs in it.

    A command gets small images, two steps and narrow backbones; weights that would be downloaded are random.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._main = folder / ".programs" / "distill-d2"
        self._main.parent.mkdir()
        self._main.write_text(MAIN)
        self._count = 0
        write_data(folder)

    def run(self, words: list[str]) -> int:
        """The exit status of a command."""
        if words[0] in NOT_RUN or words[0] == "distill-d2" and words[1] in ALSO_NOT_RUN:
            return 0
        if words[0] == "distill-d2":
            script, rest = self._main, [words[1], *self._small(words[1], words[2:])]
        elif words[1] in SCRIPTS:
            script, rest = ROOT / words[1], self._small(SCRIPTS[words[1]], words[2:])
        elif words[1] == "-m":
            script, rest = self._main.with_name("module.py"), words[2:]
            script.write_text(MODULE)
        else:
            script, rest = Path(words[1]), words[2:]
        self._count += 1
        output = self._main.parent / f"{self._count}.txt"
        process = start_script([str(script), *rest], output)
        process.join(timeout=300)
        process.kill()  # one that takes longer
        process.join()
        if process.exitcode:
            print(f"$ {' '.join(words)}\n  run as {rest}\n{output.read_text()[-4000:]}")
        return abs(process.exitcode)

    def _small(self, command: str, words: list[str]) -> list[str]:
        words = list(words)
        for name, value in SMALLER.items():
            if name in words:
                words[words.index(name) + 1] = value
        if command == "proof":
            return ["--list", *words]
        if command == "demo":
            return [*words, "--num-gpus", "0", *DEMO]
        config = option(words, "--config-file")
        if config is None or "--help" in words:
            return words
        if config.endswith(".py"):
            return [*words, *LAZY, *self._lazy_teacher(config)]
        args = parse(command, words)
        evaluation = command == "evaluate" or "--eval-only" in words
        return [*words, *self._yaml_keys(config, args.opts, evaluation, bool(args.imports))]

    def _yaml_keys(self, config: str, opts: list[str], evaluation: bool, imports: bool) -> list[str]:
        keys: dict[str, Any] = {**SHORT, **NARROW}
        if not imports:  # what these register would stay in this process
            cfg = load_config(config, [*opts, *pairs(NARROW)])
            node = cfg.MODEL.DISTILLER
            if not Path(cfg.MODEL.WEIGHTS).is_file():
                keys["MODEL.WEIGHTS"] = (
                    self._random_weights(cfg, Path(config).stem) if evaluation else ""
                )
            if node.MODEL_DISTILLER_CONFIG and (node.EVAL_TEACHER or not evaluation):
                keys["MODEL.DISTILLER.MODEL_LOAD_OFFICIAL"] = False
                keys["MODEL.DISTILLER.MODEL_DISTILLER_CONFIG"] = self._teacher(node)
                if not Path(node.TEACHER_WEIGHTS).is_file():
                    keys["MODEL.DISTILLER.TEACHER_WEIGHTS"] = '""'
        return pairs(keys)

    def _teacher(self, node: Any) -> str:
        """A narrow form of the teacher, whose weights are those of its config, where they are there."""
        path = Path(node.MODEL_DISTILLER_CONFIG)
        path = path if path.is_file() else Path(find_config(str(path)))
        if path.suffix == ".py":
            return str(path)
        file = self._main.parent / f"{path.stem}_narrow.yaml"
        content: dict[str, Any] = {"_BASE_": str(path.resolve()), "MODEL": {"RESNETS": {}}}
        content["MODEL"]["RESNETS"] = {name.split(".")[-1]: value for name, value in NARROW.items()}
        file.write_text(yaml.safe_dump(content))
        cfg = load_config(str(file))
        if not Path(cfg.MODEL.WEIGHTS).is_file() and not Path(node.TEACHER_WEIGHTS).is_file():
            content["MODEL"]["WEIGHTS"] = self._random_weights(cfg, file.stem)
            file.write_text(yaml.safe_dump(content))
        return str(file)

    def _lazy_teacher(self, config: str) -> list[str]:
        """Overrides for a LazyConfig whose teacher's weights would be downloaded."""
        node = LazyConfig.load(find_config(config)).get("distiller")
        if node is None or Path(node.get("TEACHER_WEIGHTS", "")).is_file():
            return []
        teacher = self._teacher(SimpleNamespace(TEACHER_WEIGHTS="", **node))
        return [f"distiller.MODEL_DISTILLER_CONFIG={teacher}", "+distiller.BYPASS_DISTILL=0"]

    def _random_weights(self, cfg: Any, name: str) -> str:
        file = self._main.with_name(f"{name}.pth")
        cfg.MODEL.DEVICE = "cpu"
        torch.save({"model": build_model(cfg).state_dict()}, file)
        return str(file)


def pairs(keys: dict[str, Any]) -> list[str]:
    """KEY VALUE words."""
    return [str(word) for item in keys.items() for word in item]


def parse(command: str, words: list[str]) -> argparse.Namespace:
    """What a command of distill-d2 reads of these words, with its own parser; AssertionError if they are wrong."""
    module = importlib.import_module(f"distill_d2.commands.{command.replace('-', '_')}")
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    parser.error = _refuse  # type: ignore[assignment]
    return (parser.parse_intermixed_args if hasattr(module, "INTERMIXED") else parser.parse_args)(words)


def _refuse(message: str) -> NoReturn:
    raise AssertionError(message)


def load_config(config: str, opts: list[str] | None = None) -> Any:
    """A config, whose datasets are not registered: another page has others of the same names."""
    with mock.patch.multiple(
        config_loading, register_custom_datasets=mock.DEFAULT, adopt_coco_datasets=mock.DEFAULT
    ):
        return config_loading.load_config(config, opts)


def write_data(folder: Path) -> None:
    """Stand-ins for COCO, VOC, shapes, the proof's photos, a user's own data, and photos."""
    categories = [{"id": c["id"], "name": c["name"]} for c in COCO_CATEGORIES if c["isthing"]]
    coco = folder / "datasets" / "coco"
    for split in ("train2017", "val2017"):
        write_coco(coco / "annotations" / f"instances_{split}.json", coco / split, 2, categories)
    images = {"1": [("cat", 5, 5, 40, 30)], "2": [("dog", 10, 8, 50, 35), ("cat", 2, 2, 20, 20)]}
    for year, split in ((2007, "trainval"), (2007, "test"), (2012, "trainval")):
        write_voc(folder / "datasets" / f"VOC{year}", images, split)
    cells = {"1": [("RBC", 5, 5, 40, 30), ("WBC", 20, 10, 50, 35), ("Platelets", 2, 2, 20, 20)]}
    for split in ("train", "val"):
        write_voc(folder / "datasets" / "bccd", cells, split)
    for split in ("train", "val"):
        nuclei = folder / "datasets" / "nuclei"
        write_coco(
            nuclei / "annotations" / f"{split}.json",
            nuclei / "images",
            2,
            [{"id": 1, "name": "nucleus"}],
        )
    cards = [{"id": id_, "name": name} for id_, name in enumerate(CARDS, 1)]
    for name, classes in (("data/cards", cards), ("datasets/voc_animals", None)):
        for split in ("train", "val", "test"):
            file = folder / name / "annotations" / f"{split}.json"
            write_coco(file, folder / name / "images", 6, classes)
    for split, (count, seed) in SPLITS.items():
        shapes = Path(generate_shapes(str(folder / "datasets" / "shapes"), split, 12, seed)[0])
        content = json.loads(shapes.read_text())
        content["info"]["num_images"] = count  # else it is generated again
        shapes.write_text(json.dumps(content))
    (folder / "datasets" / "cards").symlink_to(folder / "data" / "cards")
    write_coco(folder / "unused.json", folder / "photos", 2)


def write_coco(
    file: Path, images: Path, count: int, categories: list[dict[str, Any]] | None = None
) -> None:
    entry = write_dataset(file.parent / f".{file.stem}", count=count)
    content = json.loads(Path(entry["JSON"]).read_text())
    content["categories"] = categories or content["categories"]
    for annotation in content["annotations"]:
        annotation["category_id"] = 1 + (annotation["category_id"] - 1) % len(content["categories"])
    for image in content["images"]:
        name = f"{file.stem}_{image['file_name']}"
        images.mkdir(parents=True, exist_ok=True)
        (Path(entry["IMAGES"]) / image["file_name"]).rename(images / name)
        image["file_name"] = name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
