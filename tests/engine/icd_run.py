"""One step of ICD in each phase of a training, in each of two processes; started by test_icd.py."""

from pathlib import Path

import torch
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from distill_d2.engine import argument_parser, launch, setup
from distill_d2.engine.trainer import distributed
from distill_d2.testing import tiny_batch

# Of a run with PRETRAIN_TEACHER_ITERS 2, BYPASS_DISTILL 1, STOP_JOINT 3: the student's iteration, and
# the numbers of objects in the images of the processes. The last only has to go through.
PHASES = {
    "pretraining": (-1, (1, 3)),
    "bypassed": (0, (1, 3)),
    "distilling": (2, (3, 1)),
    "one without objects": (2, (2, 0)),
    "all without objects": (2, (0, 0)),
    "stopped": (4, (1, 3)),
    "once more": (2, (1, 3)),
}


def images_of(objects):
    """One image per process, with that many objects."""
    images = tiny_batch(len(objects), objects=max(*objects, 1))
    return [
        [{**image, "instances": image["instances"][:count]}] for image, count in zip(images, objects)
    ]


def step(model, plain, iteration, inputs):
    """The losses and gradients of a step by their names."""
    plain.zero_grad()
    plain.student.loss_normalizer = 100
    with EventStorage(iteration + plain.phases.pretrain_iters):
        losses = model(inputs)
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    return {name: loss.detach() for name, loss in losses.items()}, gradients


def start(cfg):
    """The model with the weights that all processes start from."""
    model = build_model(cfg).train()
    model.phases.supported_by_trainer = True
    model.load_state_dict(torch.load(Path(cfg.OUTPUT_DIR) / "start.pth", weights_only=True))
    return model


def compute(cfg):
    """Write each process's results of each phase to a file."""
    model = start(cfg)
    wrapped = distributed(model)
    results = {}
    for name, (iteration, objects) in PHASES.items():
        losses, gradients = step(wrapped, model, iteration, images_of(objects)[comm.get_rank()])
        results[name] = losses, {key: gradient.clone() for key, gradient in gradients.items()}
    torch.save(results, Path(cfg.OUTPUT_DIR) / f"rank{comm.get_rank()}.pth")


def work(args):
    compute(setup(args, distill=True))


if __name__ == "__main__":
    launch(work, argument_parser().parse_args())
