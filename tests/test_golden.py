"""What independent implementations returned for fixed inputs, kind by kind of distill_d2/golden."""

from __future__ import annotations

import gc
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest

from distill_d2.golden import FixtureError, GoldenKind, load_kinds, neck

Arrays = dict[str, np.ndarray]

SHARED = Path(__file__).resolve().parents[2] / "shared"
KINDS = load_kinds()
# By kind, the arrays of its recorded fixture that nothing is compared with: inputs, and notes. Everything
# else has to be compared.
INPUTS = {
    "adet_condinst": (
        "image* keys* gt/img?/boxes gt/img?/classes gt/img?/poly* fn/aligned_bilinear/in fn/dice/pred "
        "fn/dice/target fn/dyn/mask_feats fn/dyn/params fn/dyn/locations fn/dyn/im_inds fn/dyn/fpn_levels"
    ),
    "adet_fcos": "image* keys gt/* fn/ious/pred fn/ious/target",
    "adet_poto": "image* */keys gt/*",
    "adet_solov2": (
        "image* keys gt/* fn/nms/masks fn/nms/labels fn/nms/scores fn/point_nms/in fn/imrescale/in "
        "fn/dice/pred fn/dice/target *pred_boxes"  # boxes of detections are zeros there
    ),
    "defeat": "mask_gt_boxes_* kd_gt_boxes_* neck_* adapt_* bb_student_* bb_teacher_* cls_*",
    "ghnd": (
        "quant/*/x large/x large/teacher large/w/* full/img* "
        "*/grad*decoder.3.bias *.decoder.8.bias"  # gradients of biases before a norm: rounding errors
    ),
    "gid": (
        "image_sizes padded_size strides level_shapes anchors* cfg_json num_classes gt_boxes gt_classes "
        "gt_image teacher_* student_* adapter_weight adapter_bias margins_json ref_stats_json seed"
    ),
    "icd_decoder": "in/* w/* rng/* prior/* meta_json",
    "ssd_forward": "image_rgb_blocks_30x30",
    "ssd_kd": "gt_* conf_* loc_* soft_logits_* br_student br_teacher br_gt *conf_index",
    **neck.INPUTS,
}
# Results that others are computed from, gradients that are rounding errors, and levels without an object.
NOT_CHANGED = (
    "*image_size *_shape *@shape *_grad_*_index */grad/param/*pos_projector.bias "
    "targets/*gt_inds[2-4] targets/*reg[2-4]"
)


def load(name: str) -> Arrays:
    """The arrays of a file; skips where the folder is not there."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the golden fixtures in {SHARED / 'golden'}, which is not there")
    with np.load(SHARED / "golden" / f"{name}.npz") as file:
        return {array: file[array] for array in file.files}


def matches(name: str, patterns: str | tuple[str, ...]) -> bool:
    patterns = patterns.split() if isinstance(patterns, str) else patterns
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def results(kind: str, arrays: Arrays) -> set[str]:
    return {name for name in arrays if not matches(name, INPUTS[kind])}


def run(kind: str, arrays: Arrays) -> dict[str, bool]:
    """Whether each compared array passes."""
    return {found.name: found.passed for found in KINDS[kind].run(arrays).comparisons}


def fixtures() -> list[tuple[str, str]]:
    """Files and the kinds that they are of."""
    if not SHARED.is_dir():
        return [(kind, kind) for kind in INPUTS]
    found = []
    for path in sorted((SHARED / "golden").glob("*.npz")):
        with np.load(path) as file:
            names = dict.fromkeys(file.files)
        found += [(path.stem, kind) for kind in KINDS if KINDS[kind].fits(names)]
    return found


@pytest.mark.parametrize("name, kind", fixtures())
def test_every_recorded_array(name, kind):
    arrays = load(name)
    assert kind in INPUTS, f"add the inputs of {name}.npz to INPUTS"
    found = run(kind, arrays)
    assert [array for array, passed in found.items() if not passed] == []
    assert set(found) - {"full/grad"} == results(kind, arrays)  # GHND's names of gradients are no array


def test_every_kind_with_a_recorded_fixture_runs():
    load("gid")
    assert {kind for _, kind in fixtures()} >= set(INPUTS)


def changed(array: np.ndarray, everywhere: bool) -> np.ndarray:
    """Its largest number is a hundredth larger, or a flag, a class or some pixels are others."""
    array = np.array(array)
    size = np.abs(np.where(np.isfinite(array), array, 0.0) if array.dtype.kind == "f" else array)
    index = slice(None) if everywhere else size.argmax()
    if array.dtype == np.uint8 and array.ndim == 2:
        array[0, :2] ^= 0xFF  # packed masks, of which a few pixels may be others
    elif array.dtype == bool:
        array.flat[index] ^= True
    elif array.dtype.kind in "iu":
        # Levels of a quantizer may be one off, areas a few.
        array.flat[index] = array.flat[index] ^ 2 if array.dtype == np.uint8 else array.flat[index] + 9
    else:
        array.flat[index] += 0.01 * size.flat[index] + 3e-5
    return array


@pytest.mark.parametrize("kind", INPUTS)
def test_every_changed_array_fails(kind):
    """All at once: a run takes seconds."""
    arrays = load(kind)
    names = results(kind, arrays)
    wrong = {n for n in names if arrays[n].size and arrays[n].dtype.kind != "U"}
    wrong = {name for name in wrong if not matches(name, NOT_CHANGED)}
    everywhere = {name for name in wrong if name.startswith("targets/")}  # some rows are no object's
    other = {name: changed(arrays[name], name in everywhere) for name in wrong}
    found = run(kind, {**arrays, **other})
    assert wrong - {name for name, passed in found.items() if not passed} == set()


# Files of the same layout


def of_images(arrays: Arrays, patterns: str, images: list[int]) -> Arrays:
    """The images' parts of the arrays whose first dimension is that of images."""
    return {name: x[images] if matches(name, patterns) else x for name, x in arrays.items()}


def numbered(arrays: Arrays, pattern: str, images: list[int]) -> Arrays:
    """Arrays whose names have an image's number, of these images, with new numbers."""
    count = len(images)
    while any(name.startswith(pattern.format(count)) for name in arrays):
        count += 1
    kept = {
        n: x for n, x in arrays.items() if not n.startswith(tuple(map(pattern.format, range(count))))
    }
    for new, old in enumerate(images):
        prefix = pattern.format(old)
        renamed = {n: x for n, x in arrays.items() if n.startswith(prefix)}
        kept.update({pattern.format(new) + n[len(prefix) :]: x for n, x in renamed.items()})
    return kept


def other_gid(arrays: Arrays) -> Arrays:
    arrays = of_images(arrays, "image_sizes teacher_* student_* *gi_count", [1])
    mine = arrays["gt_image"] == 1
    truth = {name: arrays[name][mine] for name in ("gt_boxes", "gt_classes")}
    images = {"gt_image": np.zeros(mine.sum(), int), "out_gi_image": np.zeros(10, int)}
    return {**arrays, **truth, **images}


def other_defeat(arrays: Arrays) -> Arrays:
    arrays = of_images(arrays, "neck_student_* neck_teacher_* bb_student_* bb_teacher_*", [1, 0, 1])
    rows = {name: arrays[name][:9] for name in arrays if name.startswith("cls_")}
    return numbered({**arrays, **rows}, "kd_gt_boxes_{}", [1, 0, 1])


def other_ssd_kd(arrays: Arrays) -> Arrays:
    arrays = of_images(arrays, "conf_student_* conf_teacher_* loc_*", [1, 0, 1])
    return numbered(arrays, "gt_{}", [1, 0, 1])


def other_icd(arrays: Arrays) -> Arrays:
    arrays = of_images(arrays, "in/image_sizes_hw in/*_feat/*", [1])
    for pattern in ("in/gt_boxes/{}", "in/gt_classes/{}", *(f"rng/{x}/{{}}" for x in DRAWS)):
        arrays = numbered(arrays, pattern, [1])
    return arrays


DRAWS = ("class_draw", "normal_draw", "rand_xy", "jitter_u")


def other_ghnd(arrays: Arrays) -> Arrays:
    return numbered(arrays, "full/img{}", [1])


def images_exchanged(arrays: Arrays) -> Arrays:
    """Of a detector."""
    for part in ("image{}", "gt/img{}"):
        arrays = numbered(arrays, part, [1, 0])
    return arrays


def other_neck(arrays: Arrays) -> Arrays:
    """The last two images."""
    count = len(arrays[next(name for name in arrays if name.startswith("student/"))])
    images = [count - 1, count - 2]
    per_image = f"student/* teacher/* narrow/* image_sizes {neck.PER_IMAGE}"
    arrays = of_images(arrays, per_image, images)
    if "boxes" in arrays:
        mine = np.isin(arrays["box_image"], images)
        arrays["boxes"] = arrays["boxes"][mine]
        arrays["box_image"] = count - 1 - arrays["box_image"][mine]
    return arrays


OTHERS = {
    **dict.fromkeys(neck.INPUTS, other_neck),
    "gid": other_gid,
    "defeat": other_defeat,
    "ssd_kd": other_ssd_kd,
    "icd_decoder": other_icd,
    "ghnd": other_ghnd,
    "adet_fcos": images_exchanged,
    "adet_condinst": images_exchanged,
    "adet_poto": images_exchanged,
    "adet_solov2": images_exchanged,
}


def recorded_anew(kind: GoldenKind, arrays: Arrays) -> Arrays:
    """With what distill_d2 computes as results."""
    found = {found.name: found for found in kind.run(arrays).comparisons}
    gc.collect()  # networks of full size, which are parts of cycles
    return {
        name: found[name].actual.astype(x.dtype) if name in found and x.dtype.kind != "U" else x
        for name, x in arrays.items()
    }


@pytest.mark.parametrize("kind", OTHERS)
def test_other_sizes(kind):
    """Sizes and images are the file's: other images give another result. That numbers are right is said
    by the recorded ones."""
    recorded = load(kind)
    arrays = OTHERS[kind](recorded)
    for _ in range(2):  # detections follow from outputs that the fixture has
        arrays = recorded_anew(KINDS[kind], arrays)
    assert all(run(kind, arrays).values())
    assert any(not np.array_equal(arrays[name], recorded[name]) for name in results(kind, arrays))


@pytest.mark.parametrize(
    "kind, name, message",
    [
        ("defeat", "G_other_loss", r"has a case 'G_other'; known are \['A_defeat_neck', "),
        ("ssd_kd", "kd_other_loss_bare", r"has a case 'kd_other'; known are \['hard', 'kd_default', "),
        ("ghnd", "recipe/layer5.0.conv1.weight", "there is no tensor 'layer5.0.conv1.weight'"),
        ("ssd_forward", "resnet_conf", r"has arrays of unknown networks \['resnet'\]"),
        (
            "adet_solov2",
            "eval/soft_nms/img0/scores",
            "has detections 'eval/soft_nms', .* settings are unknown",
        ),
        ("adet_solov2", "train/cropped/loss_ins", "has losses 'train/cropped', .* batch is unknown"),
        ("adet_condinst", "train/boxes/loss_mask", r"\['boxes'\]; known are \['poly'"),
        ("adet_fcos", "eval/other/img0/scores", r"\['other'\]; known are \['default'"),
    ],
)
def test_unknown_cases(kind, name, message):
    with pytest.raises(FixtureError, match=message):
        run(kind, {name: np.ones(1), **load(kind)})


@pytest.mark.parametrize("kind, name", [("adet_fcos", "ctrness"), ("adet_solov2", "kernel_pred.bias")])
def test_keys_of_another_model(kind, name):
    arrays = load(kind)
    arrays["keys"] = np.array(str(arrays["keys"]).replace(name, "other"))
    with pytest.raises(FixtureError, match="other (keys or shapes|tensors)"):
        run(kind, arrays)


def test_detections_in_another_order():
    arrays = load("adet_fcos")
    for name in [n for n in arrays if n.startswith("eval/default/img0/") and "image_size" not in n]:
        arrays[name] = arrays[name][::-1]
    assert all(run("adet_fcos", arrays).values())
