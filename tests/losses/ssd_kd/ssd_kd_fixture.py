"""A golden fixture of SSDKD in another configuration, from naive versions; nothing of the package.

Three images with two, no and five objects, of four classes; another seed, sizes and temperatures.
"""

from __future__ import annotations

from types import SimpleNamespace

import naive_ssd as ssd
import naive_ssd_kd as naive
import numpy as np

Arrays = dict[str, np.ndarray]

CLASSES = 5  # with the background, the first
NETWORKS = {
    "kd": (
        *((19, 10, 5, 3, 2, 1), (16, 32, 64, 100, 150, 300)),
        *((60, 105, 150, 195, 240, 285), (105, 150, 195, 240, 285, 330), [(2, 3)] * 6),
    ),
    "ssd300": (
        *((38, 19, 10, 5, 3, 1), (8, 16, 32, 64, 100, 300)),
        *((30, 60, 111, 162, 213, 264), (60, 111, 162, 213, 264, 315)),
        [(2,), (2, 3), (2, 3), (2, 3), (2,), (2,)],
    ),
}
OBJECTS = [
    [[0.11, 0.08, 0.43, 0.52, 1], [0.5, 0.61, 0.71, 0.77, 3]],
    [],
    [
        *([0.2, 0.31, 0.71, 0.93, 0], [0.21, 0.31, 0.7, 0.94, 2], [0.02, 0.01, 0.97, 0.99, 1]),
        *([0.8, 0.1, 0.95, 0.33, 3], [0.3, 0.4, 0.46, 0.81, 0]),
    ],
]
INPUTS = ("gt_", "conf_", "loc_", "soft_logits_", "br_student", "br_teacher", "br_gt")
PLAIN = {"u": 0.5, "neg_w": 1.5, "pos_w": 1.0, "T": 1.0, "m": 0.0, "lmda": 1.0}
CASES = {
    "hard": {"boxes": "", "u": 1.0},
    "kd_default": {"boxes": "good"},
    "kd_badteacher": {"boxes": "bad"},
    "kd_T2_w3_m1_l2": {
        "boxes": "bad",
        "u": 0.25,
        "neg_w": 3.0,
        "pos_w": 0.5,
        "T": 2.0,
        "m": 1000.0,
        "lmda": 2.0,
    },
    "kd_u1": {"boxes": "good", "u": 1.0},
}


def is_input(name: str) -> bool:
    return name.startswith(INPUTS) or name.endswith(("conf_index",))


def make_fixture(seed: int = 5) -> Arrays:
    """All arrays by name, those of the recorded one."""
    random = np.random.default_rng(seed)
    truth = [np.float32(objects).reshape(-1, 5) for objects in OBJECTS]
    arrays: Arrays = {f"gt_{i}": objects for i, objects in enumerate(truth)}
    found = {}
    for network, settings in NETWORKS.items():
        priors = ssd.priors(*settings, 300)
        arrays[f"priors_{network}_{len(priors)}"] = np.float32(priors)
        found[network] = step = _match(priors, truth)
        arrays[f"match_{network}_conf_t"] = np.int16(step.labels)
        arrays[f"match_{network}_pos_index"] = np.int32(step.index)
        arrays[f"match_{network}_pos_loc_t"] = np.float32([step.wanted[i][r] for i, r in step.index])
    step = found["kd"]
    arrays.update(_inputs(random, step))
    read = {name: arrays[f"{name}_q64"] / 64.0 for name in _READ}
    _, _, selected = ssd.multibox(
        read["conf_student"].tolist(), read["loc_student"].tolist(), step.labels, step.wanted, 0, 3
    )
    negatives = np.zeros(step.labels.shape, bool)
    for image, rows in enumerate(selected):
        for row in rows:
            negatives[image, row] = step.labels[image, row] == 0
    arrays["hard_negative_mask"] = np.packbits(negatives, axis=1)
    for case, settings in CASES.items():
        s = SimpleNamespace(**{**PLAIN, **settings})
        arrays.update({f"{case}_{name}": x for name, x in _case(case, s, read, step, selected).items()})
    arrays.update(_soft(random))
    arrays.update(_bounds(random))
    arrays.update(_inference(read, step.corners))
    return arrays


_READ = ("conf_student", "conf_teacher", "loc_student", "loc_teacher_good", "loc_teacher_bad")


def _match(priors, truth):
    corners = ssd.corners(priors)
    labels = np.zeros((len(truth), len(priors)), np.int64)
    wanted = [dict() for _ in truth]
    for image, objects in enumerate(truth):
        if not len(objects):
            continue
        boxes = objects[:, :4].astype(np.float64).tolist()
        overlaps = np.array([[ssd.iou(box, prior) for prior in corners.tolist()] for box in boxes])
        for row, k in enumerate(ssd.match(overlaps, 0.5)):
            if k is not None:
                labels[image, row] = int(objects[k, 4]) + 1
                wanted[image][row] = ssd.encode(boxes[k], corners[row].tolist())
    index = [(image, row) for image, row in zip(*labels.nonzero())]
    return SimpleNamespace(corners=corners, labels=labels, wanted=wanted, index=index)


def _inputs(random, step) -> Arrays:
    shape = step.labels.shape
    arrays = {
        "conf_student_q64": np.int16(random.normal(0, 110, (*shape, CLASSES))),
        "conf_teacher_q64": np.int16(random.normal(0, 110, (*shape, CLASSES))),
        "loc_student_q64": np.int16(random.normal(0, 60, (*shape, 4))),
    }
    for kind, (scale, offset) in {"good": (5, 0), "bad": (300, 50)}.items():
        boxes = random.normal(0, 60, (*shape, 4))
        for image, row in step.index:
            boxes[image, row] = np.array(step.wanted[image][row]) * 64 + random.normal(offset, scale, 4)
        arrays[f"loc_teacher_{kind}_q64"] = np.int16(boxes)
    return arrays


def _case(case, s, read, step, selected) -> Arrays:
    conf, loc, labels = read["conf_student"], read["loc_student"], step.labels
    by_class, by_box = np.zeros_like(conf), np.zeros_like(loc)
    count = len(step.index)
    classes, boxes, _ = ssd.multibox(conf.tolist(), loc.tolist(), labels, step.wanted, 0, 3)
    total = s.u * classes + s.lmda * boxes
    weights = [s.neg_w] + [s.pos_w] * (CLASSES - 1)
    for image, rows in enumerate(selected):
        for row in rows:
            ours, theirs = conf[image, row].tolist(), read["conf_teacher"][image, row].tolist()
            gradient = np.array(naive.cross_entropy_gradient(ours, labels[image, row])) * s.u
            if s.boxes:
                loss, soft = naive.soft(ours, theirs, weights, s.T)
                total += (1 - s.u) * loss / count
                gradient += (1 - s.u) * np.array(soft)
            by_class[image, row] += gradient / count
    for image, row in step.index:
        slope = naive.smooth_l1_gradient(loc[image, row], step.wanted[image][row])
        by_box[image, row] = s.lmda * np.array(slope) / count
    if s.boxes:
        truth = [step.wanted[image][row] for image, row in step.index]
        ours, theirs = ([x[i] for i in step.index] for x in (loc, read[f"loc_teacher_{s.boxes}"]))
        bound = naive.bound_per_batch(ours, theirs, truth, s.m)
        total += s.lmda * 0.5 * bound / count
        for (image, row), wanted in zip(step.index, truth) if bound > 0 else ():
            slope = loc[image, row] - np.array(wanted)
            by_box[image, row] += s.lmda * 0.5 * 2 * slope / (4 * count) / count
        difference = conf - read["conf_teacher"]
        total += 0.5 * np.mean(difference**2)
        by_class += 0.5 * 2 * difference / difference.size
    index = np.int32(step.index)
    found = {
        "loss": np.float64(total),
        "loss_bare": np.float64(classes + boxes),
        "grad_loc_index": index,
        "grad_loc_values": np.float32([by_box[i, r] for i, r in index]),
    }
    if case == "kd_default":
        return {**found, "grad_conf": np.float32(by_class)}
    some = sorted({(i, r) for i in range(len(labels)) for r in range(9)} | set(step.index))
    found["grad_conf_index"] = np.int32(some)
    found["grad_conf_values"] = np.float32([by_class[i, r] for i, r in some])
    return found


def _soft(random) -> Arrays:
    student, teacher = (np.float32(random.normal(0, 2, (4, CLASSES))) for _ in range(2))
    arrays = {"soft_logits_student": student, "soft_logits_teacher": teacher}
    for temperature in (1, 2):
        weights = [1.5] + [1.0] * (CLASSES - 1)
        both = zip(student.tolist(), teacher.tolist())
        rows = [naive.soft(ours, theirs, weights, temperature) for ours, theirs in both]
        arrays[f"soft_T{temperature}_loss"] = np.float64(sum(loss for loss, _ in rows))
        arrays[f"soft_T{temperature}_grad"] = np.float32([gradient for _, gradient in rows])
    return arrays


def _bounds(random) -> Arrays:
    truth = np.float32(random.normal(0, 1, (6, 4)))
    # The first rows of the teacher are worse, though it is better on the whole.
    far = np.array([0.1, 0.2, 3, 3, 3, 3])[:, None]
    student = truth + np.float32(far * random.normal(0, 1, (6, 4)))
    teacher = truth + np.float32(random.normal(0, 0.5, (6, 4)))
    arrays = {"br_student": student, "br_teacher": teacher, "br_gt": truth}
    both = {"student": student, "teacher": teacher}
    for name, ours, theirs, margin in (
        ("br_active", "student", "teacher", 0.0),
        ("br_inactive", "teacher", "student", 0.0),
        ("br_inactive_margin", "teacher", "student", 100.0),
    ):
        rows = (both[ours].tolist(), both[theirs].tolist(), truth.tolist())
        bound = naive.bound_per_batch(*rows, margin)
        arrays[f"{name}_loss"] = np.float64(0.5 * bound)
        slope = 0.5 * 2 * (both[ours] - truth) / truth.size
        arrays[f"{name}_grad"] = np.float32(slope if bound > 0 else 0 * slope)
    for role, boxes in both.items():
        each = [naive.squared(a, b) for a, b in zip(boxes.tolist(), truth.tolist())]
        arrays[f"paper_br_{role}_err"] = np.float32(each)
    for name, pair in (("", (student, teacher)), ("_swapped", (teacher, student))):
        rows = zip(*(x.tolist() for x in (*pair, truth)))
        total = sum(naive.bound_per_box(*row, 0.0) for row in rows)
        arrays[f"paper_br{name}_m0_sum"] = np.float64(total)
    return arrays


def _inference(read, corners) -> Arrays:
    rows = list(zip(read["loc_student"][0].tolist(), corners.tolist()))
    boxes = [ssd.decode(delta, prior) for delta, prior in rows]
    logits = (2 * read["conf_student"][0]).tolist()
    scores = np.array([naive.softmax(row)[1:] for row in logits])
    counts, best = np.zeros(CLASSES, np.int32), np.zeros((CLASSES, 7, 5), np.float32)
    for label, row in ssd.detect(scores, boxes, 0.01, 200, 0.45, len(scores) * CLASSES):
        if counts[label + 1] < best.shape[1]:
            best[label + 1, counts[label + 1]] = [scores[row, label], *boxes[row]]
        counts[label + 1] += 1
    arrays = {"detect_counts": counts, "detect_top20": best}
    arrays["decode_img0_first100"] = np.float32(boxes[:30])
    return arrays
