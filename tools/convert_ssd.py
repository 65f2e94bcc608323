#!/usr/bin/env python
"""Convert a public SSD checkpoint into a detectron2 checkpoint of projects/SSD.

    tools/convert_ssd.py ssd300_mAP_77.43_v2.pth ssd300.pth --config-file Base-SSD300-VGG16.yaml
    tools/convert_ssd.py mb2-ssd-lite-mp-0_686.pth mb2_ssd_lite.pth --config-file Base-SSD.yaml
    tools/convert_ssd.py vgg16_reducedfc.pth vgg16.pth --config-file Base-SSD300-VGG16.yaml --backbone
    # the original SSD300 as a start for a teacher with other prior boxes
    tools/convert_ssd.py ssd300_mAP_77.43_v2.pth start.pth --config-file Base-SSD-VGG16-teacher.yaml --backbone

INPUT is a path or URL: a state_dict of amdegroot/ssd.pytorch, qfgaohao/pytorch-ssd or SSD-Knowledge-
Distillation, or a checkpoint with the entry "model". Code in it is not run. The background becomes the last
class. Names and shapes must be those of CONFIG's detector, with --backbone those of its backbone as far as
INPUT has it; otherwise nothing is written.
"""

from __future__ import annotations

from collections.abc import Sequence

from conversion import (
    ConversionError,
    Weights,
    convert_detector,
    listing,
    make_detector_parser,
    parse_arguments,
    print_result,
)
from distill_d2.projects.ssd.names import DROPPED, from_public

AUTHOR = "converted from a public SSD by distill_d2"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; exits with a message if nothing was written."""
    parser = make_detector_parser(__doc__, "leave out the heads, and layers that CONFIG lacks")
    args = parse_arguments(parser, arguments)
    weights, dropped = convert_detector(
        "convert_ssd", args, AUTHOR, lambda state_dict, _cfg: convert(state_dict, args.backbone)
    )
    print_result(args, weights, dropped, DROPPED, ", the background last among the classes")


def convert(state_dict: Weights, backbone: bool) -> tuple[Weights, list[str]]:
    """The weights by their names here, and the names that were dropped.

    Raises:
        ConversionError: the meaning of some key is not known.
    """
    weights, dropped, unknown = from_public(state_dict)
    if unknown:
        raise ConversionError(
            f"{len(unknown)} of INPUT's {len(state_dict)} keys do not belong to a known SSD: {listing(unknown)}"
        )
    if backbone:
        heads = [name for name in weights if name.startswith(("head.", "backbone.l2_norm."))]
        dropped += heads
        weights = {name: tensor for name, tensor in weights.items() if name not in heads}
    return weights, dropped


if __name__ == "__main__":
    main()
