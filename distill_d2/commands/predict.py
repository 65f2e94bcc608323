"""Find objects on images with one or several trained detectors.

Writes a picture of each image, with the detections of all runs side by side, and of the ground truth where
there is one, and OUTPUT/detections.json, in the form of COCO's results, with names of files and classes. A run is
the OUTPUT_DIR of a training, a config with weights, or one file of `distill-d2 export`; neither its
training data nor its teacher need exist. Images that cannot be read are named and skipped; the exit status is 1
then.

    distill-d2 predict --run output/pkd photos/ --output pictures
    distill-d2 predict --run output/teacher --run output/student --run output/pkd 'photos/*.jpg' --output pictures
"""

from __future__ import annotations

import argparse

from ..imports import add_import_argument
from ..run_files import check_run
from .arguments import add_device_argument, add_run_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_argument(parser, dest="runs", action="append", required=True)
    parser.add_argument(
        "--weights",
        metavar="FILE",
        default="",
        help="other weights than those of the run; for one --run",
    )
    parser.add_argument(
        "images", metavar="IMAGES", nargs="+", help="files, folders or patterns in quotes"
    )
    parser.add_argument(
        "--output", metavar="FOLDER", required=True, help="for pictures and detections.json"
    )
    parser.add_argument(
        "--threshold",
        metavar="SCORE",
        type=float,
        default=0.5,
        help="the lowest score that counts (default: 0.5)",
    )
    parser.add_argument(
        "--truth",
        metavar="JSON",
        help="annotations of the images as COCO json; default: the first run's test data, where they are here",
    )
    add_import_argument(parser)
    add_device_argument(parser)


def run(args: argparse.Namespace) -> int:
    if not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold {args.threshold}: expected a number from 0 to 1")
    if args.weights and len(args.runs) > 1:
        raise ValueError(f"--weights is for one run; found {len(args.runs)} times --run")
    for name in args.runs:
        check_run(name)

    from ..engine.output_dir import check_writable
    from ..imports import import_modules
    from ..inference import load_trained
    from ..inference.images import find_images
    from ..inference.predict import DETECTIONS, predict
    from ..inference.titles import titles_of
    from ..inference.truth import read_truth, truth_of_tests
    from .arguments import chosen_device

    import_modules(args.imports)
    images = find_images(args.images, args.output)
    check_writable(args.output, "--output")
    truth, device = read_truth(args.truth) if args.truth else None, chosen_device(args)
    titles = titles_of(args.runs)
    runs = {title: load_trained(name, args.weights, device) for title, name in zip(titles, args.runs)}
    truth = truth or truth_of_tests(next(iter(runs.values())))
    written = predict(runs, images, args.output, threshold=args.threshold, truth=truth)
    counts = f"{len(written.detections)} detections with a score of {args.threshold} or more"
    print(f"{len(written.pictures)} images, {counts}: pictures and {DETECTIONS} in {args.output}")
    if written.unreadable:
        print(f"{len(written.unreadable)} of {len(images)} images were skipped")
    return 1 if written.unreadable else 0
