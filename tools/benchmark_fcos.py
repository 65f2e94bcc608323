#!/usr/bin/env python
"""Time of projects/FCOS beside detectron2's own FCOS, of equal size and weights, in one process.

    tools/benchmark_fcos.py --height 320 --width 480 --rounds 7 --threads 1

Both have the same backbone and head (R50, but for --depth; no scales per level), the same generated
images and objects, and in inference the same candidates. In each round their training steps (forward and
backward) and inferences run in turn, in alternating order; the ratios projects/FCOS / detectron2 are taken
in each round, and their median and range printed. On a CPU they are of process time, which other work on
the machine disturbs least; on a GPU of wall-clock time, with the device synchronized.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any, Callable

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import FCOS, build_backbone, build_model
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from distill_d2.projects.fcos.names import to_detectron2
from tabulate import tabulate
from torch import nn

import distill_d2  # noqa: F401  first: it silences known warnings of detectron2
from distill_d2 import add_distill_config
from distill_d2.config import load_yaml
from distill_d2.model_zoo import get_config_file

PROJECT, DETECTRON2 = "projects/FCOS", "detectron2"
THRESHOLD = 0.05


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program."""
    args = make_parser().parse_args(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    project, detectron2s = build_pair(args)
    batch = generated_batch(args, project.proposal_generator.num_classes)
    for phase, run in (("training step", training_step), ("inference", inference)):
        times = measure(run, {PROJECT: project, DETECTRON2: detectron2s}, batch, args)
        print_phase(phase, times)
    print_setting(args, {PROJECT: project, DETECTRON2: detectron2s}, batch)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default, text in (
        ("height", 320, "of the images in pixels"),
        ("width", 480, "of the images in pixels"),
        ("batch", 2, "images"),
        ("objects", 10, "per image"),
        ("depth", 50, "of the ResNet: 50, 101 or 152"),
        ("rounds", 7, "that count; one more comes first"),
        ("threads", 1, "of torch on a CPU"),
        ("seed", 0, "of weights, images and objects"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=text)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    return parser


def config(args: argparse.Namespace) -> CfgNode:
    """The config of projects/FCOS."""
    cfg = get_cfg()
    add_distill_config(cfg)
    load_yaml(cfg, get_config_file("FCOS-Detection/R_50_1x.yaml"))
    cfg.MODEL.RESNETS.DEPTH = args.depth
    cfg.MODEL.DEVICE = args.device
    # detectron2's head has no scales, and it compares probability times quality with its threshold.
    cfg.MODEL.FCOS.USE_SCALE = False
    cfg.MODEL.FCOS.THRESH_WITH_CTR = True
    cfg.MODEL.FCOS.INFERENCE_TH_TEST = THRESHOLD
    return cfg


def build_pair(args: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
    """The detectors of projects/FCOS and of detectron2, with the same weights, which make many candidates."""
    cfg = config(args)
    project, backbone = build_model(cfg), build_backbone(cfg)
    node, shapes = cfg.MODEL.FCOS, backbone.output_shape()
    levels = [shapes[name] for name in node.IN_FEATURES]
    detectron2s = FCOS(
        backbone=backbone,
        head=FCOSHead(
            input_shape=levels,
            num_classes=node.NUM_CLASSES,
            conv_dims=[levels[0].channels] * node.NUM_CLS_CONVS,
            norm=node.NORM,
        ),
        head_in_features=node.IN_FEATURES,
        num_classes=node.NUM_CLASSES,
        test_score_thresh=THRESHOLD**0.5,  # it takes the square root first
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
    ).to(args.device)
    head = project.proposal_generator.fcos_head
    nn.init.normal_(head.cls_logits.weight, std=0.05)
    nn.init.constant_(head.bbox_pred.bias, 2.0)
    detectron2s.load_state_dict(to_detectron2(project.state_dict()))  # strict
    return project, detectron2s


def generated_batch(args: argparse.Namespace, num_classes: int) -> list[dict[str, Any]]:
    sides = torch.tensor([args.width, args.height])
    batch = []
    for _ in range(args.batch):
        corner = torch.rand(args.objects, 2) * 0.6 * sides
        boxes = torch.cat([corner, corner + (0.05 + 0.35 * torch.rand(args.objects, 2)) * sides], dim=1)
        instances = Instances(
            (args.height, args.width),
            gt_boxes=Boxes(boxes),
            gt_classes=torch.randint(num_classes, (args.objects,)),
        )
        image = torch.randint(256, (3, args.height, args.width), dtype=torch.uint8)
        batch.append({"image": image, "instances": instances})
    return batch


def training_step(model: nn.Module, batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    model.train()
    for parameter in model.parameters():
        parameter.grad = None
    with EventStorage():
        losses = model(batch)
    sum(losses.values()).backward()
    return losses


@torch.no_grad()
def inference(model: nn.Module, batch: list[dict[str, Any]]) -> list[Instances]:
    return [output["instances"] for output in model.eval()(batch)]


def measure(
    run: Callable, models: dict[str, nn.Module], batch: list[dict[str, Any]], args: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds of each model in each round but the first."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(args.rounds + 1):
        for name in sorted(models, reverse=turn % 2 == 0):
            start = now(args.device)
            run(models[name], batch)
            times[name].append(now(args.device) - start)
    return {name: seconds[1:] for name, seconds in times.items()}


def now(device: str) -> float:
    if not device.startswith("cuda"):
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def print_phase(phase: str, times: dict[str, list[float]]) -> None:
    ratios = [a / b for a, b in zip(times[PROJECT], times[DETECTRON2])]
    rows = [
        [name, *(f"{1000 * value:.1f}" for value in (statistics.median(s), min(s), max(s)))]
        for name, s in times.items()
    ]
    print(tabulate(rows, headers=[f"{phase}, ms", "median", "least", "most"], tablefmt="pipe"))
    print(
        f"{phase}: {PROJECT} / {DETECTRON2} {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f} in {len(ratios)} rounds)\n"
    )


def print_setting(
    args: argparse.Namespace, models: dict[str, nn.Module], batch: list[dict[str, Any]]
) -> None:
    counts = {name: [len(image) for image in inference(m, batch)] for name, m in models.items()}
    where = torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.machine()
    print(
        f"{args.batch} images of {args.height}x{args.width}, {args.objects} objects each; "
        f"R{args.depth}, detections {counts}; {args.threads} threads, {where}, torch {torch.__version__}"
    )


if __name__ == "__main__":
    sys.exit(main())
