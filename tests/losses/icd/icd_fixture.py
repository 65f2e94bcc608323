"""A golden fixture of ICD in another configuration, from the naive version; nothing of the package.

Three images, of which one has no instances and one so many that it gets no fakes; two layers.
"""

from __future__ import annotations

import json

import numpy as np
import torch
from naive_icd import (
    NaiveICD,
    Slots,
    draw_slots,
    queries_from_slots,
    random_weights,
    slot_count,
)

STRIDES = {"p4": 16, "p5": 32, "p6": 64}
SIZES, PADDED = [(140, 220), (190, 130), (100, 180)], (192, 256)
INSTANCES = (5, 0, 1)
INS = {
    "NUM_CLASSES": 7,
    "HIDDEN_DIM": 32,
    "ATT_HEADS": 4,
    "ATT_LAYERS": 2,
    "DISTILL_NORM": "ln",
    "PROJECT_POS": True,
    "USE_POS_EMBEDDING": True,
    "DECODER_POSEMB_ON_V": False,
    "INPUT_FEATS": list(STRIDES),
    "DROPOUT": 0.0,
    "ADD_SCALE_INDICATOR": True,
    "SAMPLE_RULE": "relative",
    "NUM_NEG_POS_RATIO": 2.0,
    "NUM_LABELS": 100,
    "MAX_LABELS": 4,
    "CONFIDENCE_LOSS_WEIGHT": 0.5,
    "VALUE_RECONST": -1.0,
    "UNIFORM_SAMPLE_CLASS": False,
    "UNIFORM_SAMPLE_BOX": False,
}
MIMIC = {
    "WEIGHT_VALUE": 3.0,
    "TEMP_VALUE": 1.0,
    "TEMP_DECAY": False,
    "TEMP_DECAY_TO": 1.0,
    "DISTILL_NEGATIVE": False,
    "LOSS_FORM": "mse",
    "SAMPLE_RANGE": 0.2,
}
SWITCHES = {"BYPASS_DISTILL": 10, "BYPASS_DISTILL_AFTER": 99999999}
ITERATION, MAX_ITER = 50, 100
VARIANTS = {
    "off": {"BYPASS_DISTILL": 60},
    "off_after": {"BYPASS_DISTILL_AFTER": 40},
    "l1": {"LOSS_FORM": "l1"},
    "smoothL1": {"LOSS_FORM": "smoothL1"},
    "L2": {"LOSS_FORM": "L2"},
    "norm_tln": {"DISTILL_NORM": "tln"},
    "norm_none": {"DISTILL_NORM": "none"},
    "temp2": {"TEMP_VALUE": 2.0},
    "temp_decay": {"TEMP_DECAY": True, "TEMP_VALUE": 2.0, "TEMP_DECAY_TO": 0.5},
    "temp_learn": {"TEMP_VALUE": -1.0},
    "distill_negative": {"DISTILL_NEGATIVE": True},
    "pos_on_v": {"DECODER_POSEMB_ON_V": True},
    "layers0": {"ATT_LAYERS": 0},
    "no_pos": {"USE_POS_EMBEDDING": False},
}
# What differs with the size of the right image; the rest of "fix/" is that of "ref/".
FIXED = ("enc/descriptor", "enc/ins_feat", "loss/", "grad/stu_feat/", "grad/param/")
FIXED_OF_LAYER = ("feat", "attn_logits", "attn_softmax", "pred", "value_mask")


def icd_arrays(seed: int = 0) -> dict[str, np.ndarray]:
    """All arrays by name."""
    arrays = {**_inputs(seed), **_prior(seed)}
    arrays.update(_draws(arrays, seed))
    for folder, bugs in (("ref/", True), ("fix/", False)):
        outcome = _run(arrays, bugs, {})
        for name, array in outcome.items():
            shared = name.startswith("geo/") or (name.startswith("enc/") and name not in FIXED)
            if shared:
                arrays[name] = array
            elif bugs or _is_fixed(name):
                arrays[folder + name] = array
    for name, overrides in VARIANTS.items():
        outcome = _run(arrays, True, overrides)
        kept = {n: array for n, array in outcome.items() if n.startswith(("loss/", "grad/stu_feat"))}
        arrays.update({f"var/{name}/{n}": array for n, array in kept.items()})
    arrays["meta_json"] = np.array(json.dumps(_meta()))
    return arrays


def _is_fixed(name: str) -> bool:
    return name.startswith(FIXED) or (name.startswith("dec/") and name.endswith(FIXED_OF_LAYER))


def _meta() -> dict:
    groups = {"INS": INS, "INS_ATT_MIMIC": MIMIC, "": SWITCHES}
    variants = {}
    for name, overrides in VARIANTS.items():
        pairs = []
        for key, value in overrides.items():
            group = next(group for group, keys in groups.items() if key in keys)
            pairs += [".".join(filter(None, ("MODEL.DISTILLER", group, key))), str(value)]
        variants[name] = {"overrides": pairs, "iteration": ITERATION, "descriptor": "ref"}
    levels = {"keys": list(STRIDES), "strides": list(STRIDES.values())}
    run = {"iteration": ITERATION, "MAX_ITER": MAX_ITER, "variants": variants}
    return {**levels, **run, **SWITCHES, "INS": INS, "INS_ATT_MIMIC": MIMIC}


def _inputs(seed: int) -> dict[str, np.ndarray]:
    generator, random = torch.Generator().manual_seed(seed), np.random.RandomState(seed)
    arrays = {"in/image_sizes_hw": np.array(SIZES), "in/padded_hw": np.array(PADDED)}
    for index, (count, (height, width)) in enumerate(zip(INSTANCES, SIZES)):
        corner = random.uniform(0, 0.5, (count, 2))
        boxes = np.hstack([corner, corner + random.uniform(0.05, 0.5, (count, 2))])
        arrays[f"in/gt_boxes/{index}"] = (boxes * [width, height, width, height]).astype(np.float32)
        arrays[f"in/gt_classes/{index}"] = random.randint(0, INS["NUM_CLASSES"], count)
    for name, stride in STRIDES.items():
        shape = (len(SIZES), INS["HIDDEN_DIM"], PADDED[0] // stride, PADDED[1] // stride)
        for side in ("tea", "stu"):
            arrays[f"in/{side}_feat/{name}"] = torch.randn(shape, generator=generator).numpy()
    options = {"heads": INS["ATT_HEADS"], "layers": INS["ATT_LAYERS"], "classes": INS["NUM_CLASSES"]}
    weights = random_weights(generator, hidden_dim=INS["HIDDEN_DIM"], **options)
    # As large as a Linear's at its start: logits of 60 would have no five digits in float32.
    weights = {name: w / 3**0.5 if w.dim() == 2 else w for name, w in weights.items()}
    weights.update({"pixel_mean": torch.zeros(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)})
    return {**arrays, **{f"w/{name}": weight.numpy() for name, weight in weights.items()}}


def _prior(seed: int) -> dict[str, np.ndarray]:
    random, classes = np.random.RandomState(seed + 1), INS["NUM_CLASSES"]
    means, deviations = random.uniform(0.1, 0.5, (classes, 4)), random.uniform(0.02, 0.2, (classes, 4))
    frequencies = random.uniform(0.1, 1, classes)
    return {
        "prior/ref_mean_std": np.stack([means, deviations], axis=1),
        "prior/ref_class_prob": frequencies / frequencies.sum(),
    }


def _draws(arrays: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    random = np.random.RandomState(seed + 2)
    prior = arrays["prior/ref_class_prob"], arrays["prior/ref_mean_std"]
    drawn = {}
    for index, count in enumerate(INSTANCES):
        slots = draw_slots(random, slot_count(count, INS), *prior)
        drawn[f"rng/class_draw/{index}"] = slots.classes
        drawn[f"rng/normal_draw/{index}"] = slots.normal
        drawn[f"rng/rand_xy/{index}"], drawn[f"rng/jitter_u/{index}"] = slots.xy, slots.jitter
    return drawn


def _queries(arrays: dict[str, np.ndarray]):
    images, draws = range(len(SIZES)), ("class_draw", "normal_draw", "rand_xy", "jitter_u")
    return queries_from_slots(
        [Slots(*(arrays[f"rng/{name}/{i}"] for name in draws)) for i in images],
        [torch.from_numpy(arrays[f"in/gt_boxes/{i}"]) for i in images],
        [torch.from_numpy(arrays[f"in/gt_classes/{i}"]) for i in images],
        SIZES,
        mean_std=arrays["prior/ref_mean_std"],
        sample_range=MIMIC["SAMPLE_RANGE"],
    )


def _run(arrays: dict[str, np.ndarray], bugs: bool, overrides: dict) -> dict[str, np.ndarray]:
    """Losses, gradients and intermediate arrays of one step, computed in float64."""
    ins, mimic, switches = (
        {key: overrides.get(key, value) for key, value in group.items()}
        for group in (INS, MIMIC, SWITCHES)
    )
    weights = {name[2:]: torch.from_numpy(arrays[name]).double() for name in arrays if name[:2] == "w/"}
    if ins["ATT_LAYERS"] == 0:
        bare = (("matt.0.matt.", "matt."), ("matt.0.", ""))
        for old, new in bare:
            weights = {name.replace(old, new): weight for name, weight in weights.items()}
    icd = NaiveICD(weights, ins, mimic, reference_bugs=bugs)
    teacher, student = (
        {name: torch.from_numpy(arrays[f"in/{side}_feat/{name}"]).double() for name in STRIDES}
        for side in ("tea", "stu")
    )
    for level in student.values():
        level.requires_grad_()
    distil = switches["BYPASS_DISTILL"] <= ITERATION <= switches["BYPASS_DISTILL_AFTER"]
    options = {"iteration": ITERATION, "max_iter": MAX_ITER, "distil": distil}
    out = icd.forward(teacher, student, _queries(arrays), SIZES, PADDED, **options)
    losses = out.pop("losses")
    losses["total"] = sum(losses.values())
    losses["total"].backward()
    grads = {f"stu_feat/{name}": _gradient(level) for name, level in student.items()}
    grads["stu_feat_is_none"] = torch.tensor([level.grad is None for level in student.values()])
    grads.update({f"param/{n}": w.grad for n, w in icd.weights.items() if w.grad is not None})
    out.update({f"loss/{name}": loss for name, loss in losses.items()})
    out.update({f"grad/{name}": grad for name, grad in grads.items()})
    return {name: _array(tensor) for name, tensor in out.items()}


def _gradient(leaf: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _array(tensor: torch.Tensor) -> np.ndarray:
    array = tensor.detach().numpy()
    return array.astype(np.float32) if array.dtype == np.float64 else array
