"""Run every command of an installed wheel, in one process and an empty folder, for test_packaging.py.

python wheel_commands.py FOLDER_OF_THE_WHEEL
"""

import os
import sys
from pathlib import Path

import distill_d2
from distill_d2.cli import COMMANDS, main

FCOS = ["--config-file", "FCOS-Detection/R_50_1x.yaml", "MODEL.DEVICE=cpu", "MODEL.FPN.OUT_CHANNELS=64"]
FCOS += ["MODEL.RESNETS.RES2_OUT_CHANNELS=8", "MODEL.RESNETS.STEM_OUT_CHANNELS=8"]
FCOS += ["MODEL.RESNETS.WIDTH_PER_GROUP=4"]


def write_inputs():
    """A dataset, a teacher, the config of a distillation, and files of other programs."""
    import numpy as np
    import torch
    from detectron2.modeling import build_model

    from distill_d2.engine import load_config
    from distill_d2.testing import (
        distiller_config,
        save_teacher,
        short_yaml,
        tiny_config,
        use_dataset,
        write_dataset,
    )

    student, teacher = tiny_config(), tiny_config(width=16)
    entry = write_dataset(Path("data").resolve())
    for path in (
        "annotations/train.json",
        "annotations/val.json",
        "annotations/test.json",
        "images/0.jpg",
    ):
        (Path("photos") / path).parent.mkdir(parents=True, exist_ok=True)
        (Path("photos") / path).write_text("{}")
    for cfg in (student, teacher):
        use_dataset(cfg, entry)
        cfg.VERSION = 2
    config = distiller_config(student, save_teacher(teacher, Path("teacher").resolve()), ["PKD"])
    config.SOLVER.MAX_ITER, config.OUTPUT_DIR = 2, "output/pkd"
    Path("distill.yaml").write_text(short_yaml(config))
    same = np.zeros((1, 4, 8, 8))
    maps = {"student/p3": same, "teacher/p3": same, "pkd/loss": 0.0, "pkd/grad/p3": same}
    np.savez("pkd.npz", **maps)
    torch.save({"model": build_model(load_config(FCOS[1], FCOS[2:])).state_dict()}, "adet.pth")


def calls():
    """The arguments of each command; several lists where it has several ways."""
    config, cpu = ["--config-file", "distill.yaml"], ["--num-gpus", 0]
    run, photos = "output/pkd", "data/images"
    weights = ["MODEL.WEIGHTS", f"{run}/model_final.pth"]
    return {
        "train": [[*cpu, *config]],
        "baseline": [[*cpu, *config, "OUTPUT_DIR", "output/alone"]],
        "evaluate": [[*cpu, "--config-file", f"{run}/config.yaml", *weights]],
        "proof": [["--list", "--data", "photos", "--pairs", "retinanet"]],
        "init": [["data", "--output", "mine", "--device", "cpu"]],
        "check": [["--device", "cpu", *config]],
        "export": [
            ["--run", run, "--output", "pkd.pth", "--device", "cpu"],
            ["--run", run, "--output", "pkd.pt", "--format", "torchscript", "--device", "cpu"],
        ],
        "predict": [
            ["--run", run, "--run", "output/alone", photos, "--output", "pictures", "--device", "cpu"]
        ],
        "profile": [["--run", run, "--seconds", 0.1, "--device", "cpu"]],
        "visualize": [
            [
                "--method",
                "pkd",
                "--images",
                1,
                "--output",
                "levels",
                "--device",
                "cpu",
                *config,
                *weights,
            ]
        ],
        "compare": [["output/alone", run]],
        "report": [["output/alone", run, "--output", "report.html", "--device", "cpu"]],
        "convert": [["adet", "adet.pth", "fcos.pth", *FCOS]],
        "benchmark": [["--size", 64, "--rounds", 1, "--device", "cpu", *config]],
        "check-golden": [["pkd.npz"]],
        "install-detectron2": [[]],
        "demo": [["SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 2]],
    }


def run_all():
    write_inputs()
    known = calls()
    missing = set(COMMANDS) - set(known)
    assert not missing, f"commands that this file does not run: {missing}"
    for name in (name for name in known if name in COMMANDS):
        for arguments in known[name]:
            words = [name, *map(str, arguments)]
            print("$ distill-d2", *words, flush=True)
            status = main(words)
            assert status == 0, f"{words}: status {status}"


if __name__ == "__main__":
    wheel = Path(sys.argv[1]).resolve()
    assert Path(distill_d2.__file__).resolve().parent == wheel / "distill_d2"
    assert not os.listdir()
    run_all()
