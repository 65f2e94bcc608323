"""The naive versions against what independent implementations returned for fixed inputs."""

import ast
import json
import re

import naive_defeat
import naive_gid
import numpy as np
import pytest
import torch
from detectron2.modeling.matcher import Matcher
from naive_icd import NaiveICD, NaiveQueries, Slots, queries_from_slots

from distill_d2.golden import defeat as golden_defeat
from distill_d2.losses.defeat import DeFeat
from distill_d2.losses.gid import GID

# ICD

VARIANTS = (
    "off off_after l1 smoothL1 L2 norm_tln norm_none temp2 temp_decay temp_learn distill_negative "
    "pos_on_v no_pos layers0"
).split()
SWITCHES = {"BYPASS_DISTILL": 10, "BYPASS_DISTILL_AFTER": 99999999}


class Golden:
    """The recorded arrays and how to run the plain version on their inputs."""

    def __init__(self, path):
        self.arrays = dict(np.load(path).items())
        self.meta = json.loads(str(self.arrays.pop("meta_json")))
        self.image_sizes = [tuple(size) for size in self.arrays["in/image_sizes_hw"].tolist()]
        self.padded_size = tuple(self.arrays["in/padded_hw"].tolist())
        assert sorted(self.meta["variants"]) == sorted(VARIANTS)

    def tensor(self, name):
        return torch.from_numpy(self.arrays[name])

    def under(self, prefix):
        """Arrays of a folder, by the rest of their names."""
        return {name: torch.from_numpy(array) for name, array in folder(self.arrays, prefix).items()}

    def expected(self, kind):
        """The arrays of ref/ or fix/; those that fix/ lacks are ref/'s."""
        return {**self.under("ref/"), **self.under(f"{kind}/")}

    def weights(self, ins):
        weights = self.under("w/")
        if ins["ATT_LAYERS"]:
            return weights
        return {n.replace("matt.0.matt.", "matt.").replace("matt.0.", ""): w for n, w in weights.items()}

    def queries(self):
        names = ("classes", "boxes_norm", "jittered_xy", "ltrb_target", "is_real", "pad_mask")
        return NaiveQueries(*(self.tensor(f"enc/{name}") for name in names))

    def settings(self, variant):
        """INS, INS_ATT_MIMIC and the switches of a variant."""
        ins, mimic, switches = dict(self.meta["INS"]), dict(self.meta["INS_ATT_MIMIC"]), dict(SWITCHES)
        overrides = self.meta["variants"][variant]["overrides"] if variant else []
        for name, value in zip(overrides[0::2], overrides[1::2]):
            *_, group, key = name.split(".")
            {"INS": ins, "INS_ATT_MIMIC": mimic, "DISTILLER": switches}[group][key] = literal(value)
        return ins, mimic, switches

    def run(self, reference_bugs, variant=None, descriptor=None, backward=True):
        """The plain version, its arrays and the student's features, with gradients."""
        ins, mimic, switches = self.settings(variant)
        iteration = self.meta["iteration"]
        icd = NaiveICD(self.weights(ins), ins, mimic, reference_bugs)
        student = {name: level.requires_grad_() for name, level in self.under("in/stu_feat/").items()}
        out = icd.forward(
            self.under("in/tea_feat/"),
            student,
            self.queries(),
            self.image_sizes,
            self.padded_size,
            iteration=iteration,
            max_iter=self.meta["MAX_ITER"],
            distill=switches["BYPASS_DISTILL"] <= iteration <= switches["BYPASS_DISTILL_AFTER"],
            descriptor=descriptor,
        )
        if backward:
            sum(out["losses"].values()).backward()
        return icd, out, student


def literal(text):
    try:
        return ast.literal_eval(text)
    except ValueError:
        return text


@pytest.fixture
def golden(shared):
    return Golden(shared / "golden" / "icd_decoder.npz")


def close(actual, expected, name):
    """Equal up to the tolerance the recording states; infinities exactly."""
    actual, expected = actual.detach(), torch.as_tensor(expected)
    assert actual.shape == expected.shape, name
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5, msg=lambda m: f"{name}: {m}")


def gradient_close(actual, expected, name):
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-4, msg=lambda m: f"{name}: {m}")


def losses_close(losses, expected):
    """All losses and nothing else, and their sum."""
    expected = dict(expected)
    close(sum(losses.values()), expected.pop("total"), "total")
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        close(losses[name], value, name)


def student_gradients_close(student, expected):
    for (name, level), is_none in zip(student.items(), expected["stu_feat_is_none"].tolist()):
        assert (level.grad is None) == is_none
        gradient = torch.zeros_like(level) if is_none else level.grad
        gradient_close(gradient, expected[f"stu_feat/{name}"], name)


def folder(arrays, prefix):
    return {name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}


# -- recorded


def test_queries_from_the_recorded_draws(golden):
    draws = ("class_draw", "normal_draw", "rand_xy", "jitter_u")
    images = range(len(golden.image_sizes))
    queries = queries_from_slots(
        [Slots(*(golden.arrays[f"rng/{name}/{i}"] for name in draws)) for i in images],
        [golden.tensor(f"in/gt_boxes/{i}") for i in images],
        [golden.tensor(f"in/gt_classes/{i}") for i in images],
        golden.image_sizes,
        mean_std=golden.arrays["prior/ref_mean_std"],
        sample_range=golden.meta["INS_ATT_MIMIC"]["SAMPLE_RANGE"],
    )
    for name, value in vars(golden.queries()).items():
        close(getattr(queries, name), value, name)


@pytest.mark.parametrize("kind", ["ref", "fix"])
def test_arrays_of_the_forward_pass(golden, kind):
    _, out, _ = golden.run(kind == "ref", backward=False)
    recorded = {**golden.under(""), **golden.expected(kind)}
    recorded = {n: array for n, array in recorded.items() if n.startswith(("enc/", "dec/", "geo/"))}
    assert recorded.keys() == out.keys() - {"losses"}
    for name, value in recorded.items():
        close(out[name], value, name)


@pytest.mark.parametrize("kind", ["ref", "fix"])
def test_losses(golden, kind):
    _, out, _ = golden.run(kind == "ref")
    losses_close(out["losses"], folder(golden.expected(kind), "loss/"))


@pytest.mark.parametrize("kind", ["ref", "fix"])
def test_gradients(golden, kind):
    icd, _, student = golden.run(kind == "ref")
    expected = folder(golden.expected(kind), "grad/")
    student_gradients_close(student, expected)
    gradients = {name: w.grad for name, w in icd.weights.items() if w.grad is not None}
    recorded = folder(expected, "param/")
    assert gradients.keys() == recorded.keys()
    for name, value in recorded.items():
        gradient_close(gradients[name], value, name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(golden, variant):
    _, out, student = golden.run(True, variant)
    losses_close(out["losses"], golden.under(f"var/{variant}/loss/"))
    student_gradients_close(student, golden.under(f"var/{variant}/grad/"))


# GID


@pytest.fixture
def gid(shared):
    with np.load(shared / "golden" / "gid.npz") as file:
        return {name: file[name] for name in file.files}


def test_gid(gid):
    """Instances, rows, pooled features, losses and gradients of the authors' settings."""
    tensor = {name: torch.from_numpy(x) for name, x in gid.items() if x.dtype.kind != "U"}
    cfg = json.loads(str(gid["cfg_json"]))
    s = GID.Settings(
        gi_score="max_first",
        gi_nms_thresh=cfg["nms"],
        gi_pre_nms_topk=cfg["pre"],
        gi_post_nms_topk=cfg["post"],
        pooler_resolution=cfg["res"],
        pooler_sampling_ratio=cfg["sr"],
        feature_weight=cfg["wf"],
        relation_weight=cfg["wr"],
        response_cls_weight=cfg["wc"],
        response_reg_weight=cfg["wb"],
        response_reg_smooth_l1_beta=cfg["rbeta"],
    )
    strides = {f"p{int(np.log2(stride))}": stride for stride in gid["strides"].tolist()}
    teacher, student = (
        naive_gid.Heads(
            tensor[f"{role}_logits"],
            tensor[f"{role}_deltas"],
            {name: tensor[f"{role}_feat_{name}"] for name in strides},
        )
        for role in ("teacher", "student")
    )
    sizes = gid["image_sizes"].tolist()
    anchors = tensor["anchors"].expand(len(sizes), -1, -1)
    matcher = Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True)
    rows = naive_gid.Rows(
        anchors,
        [anchors.shape[1]] * len(sizes),
        False,
        naive_gid.decode_deltas,
        naive_gid.labels_by(matcher),
    )
    truth = [tensor["gt_boxes"][tensor["gt_image"] == image] for image in range(len(sizes))]
    found = naive_gid.all_instances(teacher, student, rows, sizes, truth, s)
    assert [len(image.boxes) for image in found] == gid["out_gi_count"].tolist()
    close(torch.cat([image.boxes for image in found]), tensor["out_gi_boxes"], "boxes")
    close(torch.cat([image.scores for image in found]), tensor["out_gi_scores"], "scores")
    for part, name in (("rows", "index"), ("from_teacher", "from_teacher")):
        actual = torch.cat([getattr(image, part) for image in found])
        assert torch.equal(actual.long(), tensor[f"out_gi_{name}"].long())
    mask, _ = naive_gid.response_masks(found, rows, truth, s)
    assert torch.equal(mask.byte(), tensor["out_response_mask"])
    leaves = student.double()
    inputs = {"student_logits": leaves.logits, "student_deltas": leaves.deltas}
    inputs.update({f"student_feat_{name}": level for name, level in leaves.maps.items()})
    for leaf in inputs.values():
        leaf.requires_grad_()
    terms = naive_gid.terms(teacher.double(), leaves, found, rows, truth, strides, s)
    for name, term in zip(("feature", "relation", "cls_logits", "reg_deltas"), terms.values()):
        close(term.float(), tensor[f"out_loss_weighted_{name}"], name)
    sum(terms.values()).backward()
    for name, leaf in inputs.items():
        gradient_close(leaf.grad.float(), tensor[f"out_grad_weighted_total__{name}"], name)


# DeFeat


@pytest.fixture
def defeat(shared):
    with np.load(shared / "golden" / "defeat.npz") as file:
        return {name: file[name] for name in file.files}


def boxes_of(arrays, prefix):
    return [torch.from_numpy(arrays[name]) for name in sorted(arrays) if name.startswith(prefix)]


def numbers(arrays, prefix):
    """By what follows the prefix, of whole numbers "<prefix>q<denominator>_<rest>"."""
    found = {}
    for name, array in arrays.items():
        match = re.fullmatch(rf"{prefix}q(\d+)_?(.*)", name)
        if match:
            found[match[2]] = torch.from_numpy(array).double() / int(match[1])
    return found


@pytest.mark.parametrize("kind, prefix", [("gt", "gt_mask_"), ("roi", "roi_mask_phi0.5_")])
def test_masks_of_defeat(defeat, kind, prefix):
    masks = {n[len(prefix) :]: torch.from_numpy(x) for n, x in defeat.items() if n.startswith(prefix)}
    strides = {level: 2 ** int(level[1:]) for level in masks}
    sizes = {level: tuple(mask.shape[1:]) for level, mask in masks.items()}
    anchors = naive_defeat.square_anchors(sizes, strides)
    boxes = boxes_of(defeat, "mask_gt_boxes_")
    for level, mask in naive_defeat.object_masks(kind, boxes, sizes, strides, anchors).items():
        assert torch.equal(mask, masks[level].double()), level


@pytest.mark.parametrize("case", golden_defeat.CASES)
def test_defeat(defeat, case):
    maps = {
        role: {**numbers(defeat, f"neck_{role}_"), **numbers(defeat, f"bb_{role}_")}
        for role in ("student", "teacher")
    }
    adapters = {part: numbers(defeat, f"adapt_{part}_") for part in ("weight", "bias")}
    leaves = {f"neck_{n}" if n[0] == "P" else f"bb_{n}": x for n, x in maps["student"].items()}
    leaves.update({f"adapt_{part}_{n}": x for part, of in adapters.items() for n, x in of.items()})
    logits = [numbers(defeat, f"cls_{role}_")[""] for role in ("student", "teacher")]
    leaves["cls"], labels = logits[0], torch.from_numpy(defeat["cls_labels"])
    for leaf in leaves.values():
        leaf.requires_grad_()
    background = labels == logits[0].shape[1] - 1
    s = DeFeat.Settings(**golden_defeat.CASES[case])
    necks = {name: 2 ** int(name[1:]) for name in maps["teacher"] if name[0] == "P"}
    finest = min(necks, key=necks.get)
    step = naive_defeat.Step(
        **maps,
        strides=necks,
        stages=[name for name in maps["teacher"] if name[0] == "C"],
        anchors={},
        truth=boxes_of(defeat, "kd_gt_boxes_"),
        padded=tuple(side * necks[finest] for side in maps["teacher"][finest].shape[-2:]),
        adapters={n: tuple(adapters[p][n] for p in adapters) for n in necks} if s.neck_adapt else {},
        rows={"student": naive_defeat.RowSet(*logits, ~background, background, labels)},
        iteration=1,
        max_iter=4,
    )
    total = sum(naive_defeat.defeat(step, s).values())
    assert total.item() == pytest.approx(float(defeat[f"{case}_loss"]), rel=1e-5)
    total.backward()
    gradients = [name for name in defeat if name.startswith(f"{case}_grad_")]
    assert gradients
    for name in gradients:
        leaf = leaves[name[len(case) + len("_grad_") :]]
        gradient_close(leaf.grad.float(), torch.from_numpy(defeat[name]), name)
