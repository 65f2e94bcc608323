"""The plain ICD against arrays recorded from its paper's code, and at settings not recorded."""

import ast
import json

import numpy as np
import pytest
import torch
from naive_icd import (
    NaiveICD,
    NaiveQueries,
    Slots,
    draw_queries,
    queries_from_slots,
    random_weights,
    scale_one_hot,
    sequence,
    slot_count,
)

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
            distil=switches["BYPASS_DISTILL"] <= iteration <= switches["BYPASS_DISTILL_AFTER"],
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


def test_slots_of_the_recorded_images(golden):
    for i in range(len(golden.image_sizes)):
        n, k = len(golden.arrays[f"in/gt_classes/{i}"]), len(golden.arrays[f"rng/class_draw/{i}"])
        assert slot_count(n, golden.meta["INS"]) == k


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


def test_a_given_descriptor(golden):
    descriptor = golden.tensor("ref/enc/descriptor").transpose(0, 1)
    _, out, _ = golden.run(False, descriptor=descriptor)
    losses_close(out["losses"], golden.under("ref/loss/"))


def test_without_the_faults_a_negative_temperature_adds_nothing(golden):
    _, out, _ = golden.run(False, "temp_learn")
    losses_close(out["losses"], folder(golden.expected("fix"), "loss/"))


# -- not recorded

INS = {
    "NUM_CLASSES": 7,
    "HIDDEN_DIM": 16,
    "ATT_HEADS": 4,
    "ATT_LAYERS": 2,
    "PROJECT_POS": True,
    "USE_POS_EMBEDDING": True,
    "DECODER_POSEMB_ON_V": False,
    "DISTILL_NORM": "ln",
    "DROPOUT": 0.0,
    "ADD_SCALE_INDICATOR": True,
    "SAMPLE_RULE": "relative",
    "NUM_NEG_POS_RATIO": 5.0,
    "NUM_LABELS": 100,
    "MAX_LABELS": 300,
    "CONFIDENCE_LOSS_WEIGHT": 1.0,
    "VALUE_RECONST": -1.0,
}
MIMIC = {
    "WEIGHT_VALUE": 8.0,
    "TEMP_VALUE": 1.0,
    "TEMP_DECAY": False,
    "TEMP_DECAY_TO": 1.0,
    "DISTILL_NEGATIVE": False,
    "LOSS_FORM": "mse",
    "SAMPLE_RANGE": 0.3,
}
SIZES = [(60, 90), (50, 128)]
BOXES = [[[5.0, 5.0, 40.0, 50.0], [20.0, 10.0, 80.0, 30.0]], [[0.0, 0.0, 100.0, 40.0]]]
CLASSES = [[0, 3], [6]]


def small_weights(ins):
    return random_weights(
        torch.Generator().manual_seed(1),
        hidden_dim=ins["HIDDEN_DIM"],
        heads=ins["ATT_HEADS"],
        layers=ins["ATT_LAYERS"],
        classes=ins["NUM_CLASSES"],
        add_scale=ins["ADD_SCALE_INDICATOR"],
        reconst=ins["VALUE_RECONST"] > 0,
    )


def small_features(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"p4": (2, 16, 4, 8), "p5": (2, 16, 2, 4)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def small_run(boxes=BOXES, classes=CLASSES, mimic=(), dtype=torch.float32, **ins):
    """Random weights and features of two images; the step and the student's features."""
    ins, mimic = {**INS, **ins}, {**MIMIC, **dict(mimic)}
    icd = NaiveICD({name: w.to(dtype) for name, w in small_weights(ins).items()}, ins, mimic)
    teacher = small_features(2, dtype)
    student = {name: level.requires_grad_() for name, level in small_features(3, dtype).items()}
    boxes, classes = [torch.tensor(b) for b in boxes], [torch.tensor(c) for c in classes]
    queries = draw_queries(np.random.RandomState(3), boxes, classes, SIZES, ins, mimic)
    out = icd.forward(teacher, student, queries, SIZES, (64, 128), iteration=0, max_iter=10)
    sum(out["losses"].values()).backward()
    return icd, out, student


@pytest.mark.parametrize("n, k", [(0, 1), (1, 6), (5, 30), (49, 294), (50, 300), (200, 300), (301, 301)])
def test_slot_count(n, k):
    assert slot_count(n, INS) == k


def test_fixed_slot_count():
    fixed = {**INS, "SAMPLE_RULE": "fixed"}
    assert slot_count(0, fixed) == 100 and slot_count(101, fixed) == 101


def test_drawn_queries():
    boxes, classes = [torch.tensor(b) for b in BOXES], [torch.tensor(c) for c in CLASSES]
    queries = draw_queries(np.random.RandomState(0), boxes, classes, SIZES, INS, MIMIC)
    assert queries.is_padding.sum(1).tolist() == [0, 6] and queries.is_real.sum(1).tolist() == [2, 1]
    assert queries.classes[0, :2].tolist() == [0, 3] and queries.classes.max() < 7
    filled = ~queries.is_padding
    assert (queries.boxes[filled] >= 0).all() and (queries.boxes[filled] <= 1).all()
    assert (queries.ltrb[filled] > 0).all() and (queries.ltrb[queries.is_padding] == 0).all()


def test_scale_bins():
    pixels = torch.tensor([0, 1, 64.4, 64.6, 129, 129.4, 1e4])  # 1.44 for 1 / ln 2 moves the edges
    assert scale_one_hot(pixels).argmax(1).tolist() == [0, 0, 0, 1, 1, 2, 4]


def test_two_layers():
    _, out, student = small_run()
    assert set(out["losses"]) == {
        *(f"tea.{l}.prop_{kind}" for l in (0, 1) for kind in ("conf", "reg")),
        "distill.0.matt.value",
    }
    assert out["dec/1/attn_logits"].shape == (2, 4, 12, 40)
    assert not torch.equal(out["dec/0/feat"], out["dec/1/feat"])
    assert all(level.grad.abs().sum() > 0 for level in student.values())


@pytest.mark.parametrize("negative, slots", [(False, [2, 1]), (True, [12, 6])])
def test_mask_sums_to_the_instances(negative, slots):
    _, out, _ = small_run(mimic={"DISTILL_NEGATIVE": negative})
    sums = out["dec/1/value_mask"].sum((2, 3))
    torch.testing.assert_close(sums, torch.tensor(slots).float()[:, None].expand(2, 4))


def test_image_without_instances_counts_but_adds_nothing():
    boxes, classes = [BOXES[0], []], [CLASSES[0], []]
    _, out, student = small_run(boxes, classes)
    assert all(level.grad[1].abs().max() == 0 for level in student.values())
    layers = []
    for l in (0, 1):
        error = (out[f"dec/{l}/stu_value_normed"] - out[f"dec/{l}/tea_value_normed"])[:, 0].pow(2)
        mask = out[f"dec/{l}/value_mask"][0, :, 0].T[..., None]  # (S, h, 1), errors (S, h, d)
        layers.append(((error * mask).sum(0) / mask.sum(0)).mean())
    torch.testing.assert_close(out["losses"]["distill.0.matt.value"], 8 * sum(layers) / 2 / 2)


def test_batch_without_instances():
    _, out, student = small_run([[], []], [[], []])
    assert out["dec/0/feat"].shape[0] == 1
    assert out["losses"]["tea.0.prop_reg"] == 0 and out["losses"]["distill.0.matt.value"] == 0
    assert out["losses"]["tea.0.prop_conf"] > 0
    assert all(level.grad.abs().max() == 0 for level in student.values())


def test_unrelated_normalised_features_are_two_apart():
    _, out, _ = small_run()
    assert 8 < out["losses"]["distill.0.matt.value"] < 24


@pytest.mark.parametrize("weight", [0.0, -1.0])
def test_without_weight_the_student_is_left_alone(weight):
    _, out, student = small_run(mimic={"WEIGHT_VALUE": weight})
    assert out["losses"]["distill.0.matt.value"] == 0
    assert all(level.grad is None for level in student.values())


def test_value_reconstruction():
    icd, out, _ = small_run(VALUE_RECONST=1.0)
    _, without, _ = small_run()
    assert "loss_reconst" not in without["losses"]
    memory, error = sequence(small_features(2, torch.float32)), 0
    for l in (0, 1):
        name = f"teacher.reconst_projector.{l}"
        weight, bias = icd.weights[name + ".weight"], icd.weights[name + ".bias"]
        error += (out[f"dec/{l}/tea_value"].flatten(2) @ weight.T + bias - memory).pow(2).mean() / 2
        assert weight.grad.abs().sum() > 0
    torch.testing.assert_close(out["losses"]["loss_reconst"], error)


def test_confidence_weight():
    _, out, _ = small_run(CONFIDENCE_LOSS_WEIGHT=0.5)
    _, one, _ = small_run()
    torch.testing.assert_close(out["losses"]["tea.1.prop_conf"], one["losses"]["tea.1.prop_conf"] / 2)


OTHER = [{"ADD_SCALE_INDICATOR": False}, {"PROJECT_POS": False}, {"ATT_LAYERS": 0}]


@pytest.mark.parametrize("ins", OTHER, ids=lambda ins: next(iter(ins)))
def test_other_settings_run(ins):
    _, out, student = small_run(**ins)
    assert out["enc/descriptor"].shape[-1] == 7 + 256 + 10 * ins.get("ADD_SCALE_INDICATOR", True)
    assert all(value.isfinite() for value in out["losses"].values())
    assert all(level.grad.abs().sum() > 0 for level in student.values())


def test_float64_agrees_with_float32():
    _, single, _ = small_run()
    _, double, _ = small_run(dtype=torch.float64)
    for name, value in single["losses"].items():
        assert double["losses"][name].dtype == torch.float64
        torch.testing.assert_close(value.double(), double["losses"][name], atol=1e-5, rtol=1e-5)


def test_unknown_loss_form():
    with pytest.raises(ValueError, match="LOSS_FORM"):
        small_run(mimic={"LOSS_FORM": "huber"})
