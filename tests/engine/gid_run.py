"""Some steps of GID in each of two processes, and then, because starting them takes longer than all they
do, a training in the same processes; started by test_gid.py."""

from pathlib import Path

import torch
from detectron2.utils import comm
from icd_run import start, step

from distill_d2.engine import DistillTrainer, argument_parser, launch, setup
from distill_d2.engine.trainer import distributed
from distill_d2.testing.tiny import tiny_batch

# Of a run with START_ITER 1 and GI_MIN_SIDE 40: the iteration, and the side in pixels and the number of
# objects of each process's image. No instance fits into one of 32 pixels.
STEPS = {
    "not yet": (0, ((64, 1), (72, 3))),
    "both": (1, ((64, 3), (72, 1))),
    "one without objects": (1, ((64, 2), (72, 0))),
    "one without instances": (1, ((64, 2), (32, 1))),
    "both without instances": (1, ((32, 0), (32, 2))),
    "both again": (1, ((72, 1), (64, 3))),
}


def image_of(side, objects):
    """One image with that many objects, as a batch."""
    (image,) = tiny_batch(1, size=side, objects=max(objects, 1))
    return [{**image, "instances": image["instances"][:objects]}]


def compute(cfg):
    """Write each process's results of each step to a file."""
    model = start(cfg)
    wrapped = distributed(model)
    results = {}
    for name, (iteration, images) in STEPS.items():
        losses, gradients = step(wrapped, model, iteration, image_of(*images[comm.get_rank()]))
        results[name] = losses, {key: gradient.clone() for key, gradient in gradients.items()}
    torch.save(results, Path(cfg.OUTPUT_DIR) / f"rank{comm.get_rank()}.pth")


def work(args):
    cfg = setup(args, distill=True)
    compute(cfg)
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()


if __name__ == "__main__":
    launch(work, argument_parser().parse_args())
