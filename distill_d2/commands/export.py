"""Write a trained detector as one file, to be used elsewhere.

weights       the weights without optimizers, with the names of classes and the config, for distill_d2 and its
              commands; beside it a yaml for detectron2
onnx          the whole detector, with normalization and non-maximum suppression, for onnxruntime
torchscript   the same, for torch.jit.load in Python and C++
torch-export  the same, for torch.export.load, for inputs of one size

The last three are compared with the model on images, and a json beside the file describes input, outputs and
classes.

    distill-d2 export --run output/pkd --output pkd.pth
    distill-d2 export --run output/pkd --output pkd.onnx
    distill-d2 export --run output/pkd --output deploy/ --format torch-export --size 480x640 --images photos/
"""

from __future__ import annotations

import argparse
import os

from ..imports import add_import_argument
from ..run_files import check_run
from .arguments import add_device_argument, add_run_argument, height_and_width

SUFFIXES = {"weights": ".pth", "onnx": ".onnx", "torchscript": ".pt", "torch-export": ".pt2"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_argument(parser, required=True)
    parser.add_argument(
        "--weights", metavar="FILE", default="", help="other weights than those of the run"
    )
    parser.add_argument(
        "--output",
        metavar="FILE or FOLDER",
        required=True,
        help=f"in a folder the file is named as the run; endings: {', '.join(SUFFIXES.values())}",
    )
    parser.add_argument(
        "--format", choices=list(SUFFIXES), help="default: what the ending of --output says, or weights"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--size",
        metavar="HxW",
        help="height and width of the input; images are to be resized to fit, and filled up right and below",
    )
    size.add_argument(
        "--dynamic",
        action="store_true",
        help="inputs of any size: the default of onnx, and what torchscript always has",
    )
    parser.add_argument(
        "--images",
        metavar="IMAGES",
        nargs="+",
        action="extend",
        default=[],
        help="files, folders or patterns, to compare the file with the model on; default: 8 of the run's test "
        "data, or generated ones",
    )
    parser.add_argument(
        "--threshold",
        metavar="SCORE",
        type=float,
        default=0.0,
        help="leave out lower scores; default: only the detector's own",
    )
    add_import_argument(parser)
    add_device_argument(parser)


def run(args: argparse.Namespace) -> None:
    args.format = args.format or _format_of(args.output)
    path, size = _path(args), _size(args)
    if not 0 <= args.threshold < 1:
        raise ValueError(f"--threshold {args.threshold}: expected a number from 0 to below 1")
    check_run(args.run)

    from ..engine.output_dir import check_writable
    from ..export import check_images, export, export_weights
    from ..export.formats import require
    from ..export.inputs import fixed_size
    from ..imports import import_modules
    from ..inference import load_trained
    from ..inference.images import find_images
    from .arguments import chosen_device

    import_modules(args.imports)
    if args.format == "onnx":
        require("onnx"), require("onnxruntime")
    images = find_images(args.images) if args.images else []
    device = "cpu" if args.format == "onnx" else chosen_device(args)
    trained = load_trained(args.run, args.weights, device)
    check_writable(os.path.dirname(path) or ".", "--output")
    if args.format == "weights":
        missing = export_weights(trained, path)
        needs = f"needs distill_d2: {', '.join(missing)}" if missing else "for detectron2 alone"
        print(f"{path} ({_megabytes(path)}): weights, classes and config")
        print(f"{os.path.splitext(path)[0]}.yaml: {needs}")
        return
    fixed = fixed_size(trained)
    if args.dynamic and fixed:
        raise ValueError(
            f"--dynamic: INPUT.FIXED_SIZE is {list(fixed)}, the size of all its images; leave --dynamic out"
        )
    pixels, kind = check_images(trained, images)
    exported = export(trained, path, args.format, pixels, size=size, threshold=args.threshold)
    print(f"compared with the model on {kind}: {exported.differences}")
    if not exported.differences.detections:
        print(
            "the model finds nothing on these images, so little was compared; give --images with objects"
        )
    names = ", ".join(exported.names)
    print(f"{path} ({_megabytes(path)}): input {_size_text(exported.size)}, outputs {names}")
    print(f"{exported.description}: its input, outputs and classes")


def _format_of(output: str) -> str:
    ending = os.path.splitext(output)[1]
    return next((name for name, suffix in SUFFIXES.items() if suffix == ending), "weights")


def _path(args: argparse.Namespace) -> str:
    output, suffix = args.output, SUFFIXES[args.format]
    found = os.path.splitext(output)[1]
    if os.path.isdir(output) or not found or output.endswith(os.sep):
        name = os.path.basename(os.path.abspath(args.run))
        if os.path.isfile(args.run):
            name = os.path.splitext(name)[0]
        return os.path.join(output, name + suffix)
    if found not in SUFFIXES.values():
        raise ValueError(
            f"--output '{output}' ends with {found}; expected a file that ends with one of "
            f"{', '.join(SUFFIXES.values())}, or a folder"
        )
    if found != suffix:
        raise ValueError(
            f"--output '{output}' ends with {found}; a file of --format {args.format} ends with {suffix}"
        )
    return output


def _size(args: argparse.Namespace) -> tuple[int, int] | None:
    given = "--dynamic" if args.dynamic else f"--size {args.size}" if args.size else ""
    if given and args.format == "weights":
        raise ValueError(f"{given}: weights have no size of the input; it is for the other formats")
    if args.dynamic and args.format == "torch-export":
        raise ValueError(
            "--dynamic: torch-export takes one size of the input; give --size HxW, or --format onnx"
        )
    return height_and_width(args.size) if args.size else None


def _size_text(size: tuple[int, int] | None) -> str:
    return f"of {size[0]}x{size[1]} pixels" if size else "of any size"


def _megabytes(path: str) -> str:
    return f"{os.path.getsize(path) / 2**20:.2f} MB"
