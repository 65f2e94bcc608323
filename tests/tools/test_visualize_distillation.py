"""tools/visualize_distillation.py: that pictures show what the losses say, where they say it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from matplotlib import colormaps
from matplotlib.colors import to_rgb

from distill_d2.config import student_config
from distill_d2.losses.feature_mimic import FeatureMimic
from distill_d2.losses.gid import GeneralInstances
from distill_d2.losses.pkd import PKD
from distill_d2.testing.tiny import (
    distiller_config,
    save_teacher,
    tiny_config,
    use_dataset,
    write_dataset,
)
from distill_d2.views import Batch

TOOLS = Path(__file__).resolve().parents[2] / "tools"
METHODS = {
    "defeat": "DeFeat",
    "fgfi": "FGFI",
    "gid": "GID",
    "icd": "InstanceConditionalDistillation",
    "mimic": "FeatureMimic",
    "pkd": "PKD",
}
ICD = METHODS["icd"]
ICD_OPTIONS = ["MODEL.DISTILLER.INS.HIDDEN_DIM", "16", "MODEL.DISTILLER.INS.ATT_HEADS", "2"]
GREY = 128
ZOOM = 10  # of the images of 48 x 64 pixels that most tests draw
PADDED = (64, 64)


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(TOOLS))
    import visualize_distillation

    visualize_distillation.load_methods()
    yield visualize_distillation
    sys.path.remove(str(TOOLS))


@pytest.fixture(scope="module")
def parts(tool):
    """The modules of tools/visualize by name."""
    prefix = "visualize."
    return SimpleNamespace(
        **{
            name[len(prefix) :]: module
            for name, module in sys.modules.items()
            if name.startswith(prefix)
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a teacher with weights and of a dataset of six images."""
    folder = tmp_path_factory.mktemp("visualize")
    save_teacher(tiny_config(width=12), folder / "teacher")
    save_teacher(tiny_config("faster", width=12), folder / "faster_teacher")
    write_dataset(folder / "data")
    return folder


@pytest.fixture(scope="module")
def write_config(folder):
    """Writes the config of a distillation, with a student's checkpoint; returns its path."""

    def write(family="retinanet"):
        cfg = tiny_config(family)
        use_dataset(cfg, write_dataset(folder / "data"))
        prefix = "" if family == "retinanet" else "faster_"
        cfg = distiller_config(cfg, str(folder / f"{prefix}teacher" / "teacher.yaml"))
        cfg.VERSION = 2
        cfg.MODEL.WEIGHTS = str(folder / f"{family}_student.pth")
        torch.manual_seed(7)
        torch.save({"model": build_model(student_config(cfg)).state_dict()}, cfg.MODEL.WEIGHTS)
        path = folder / f"{family}.yaml"
        path.write_text(cfg.dump())
        return str(path)

    return write


@pytest.fixture(scope="module")
def config(write_config):
    return write_config()


@pytest.fixture
def make_job(tool, config, tmp_path):
    """Builds what the program draws."""

    def make(method, *opts, config_file=config):
        arguments = ["--config-file", config_file, "--method", method, "--output", str(tmp_path)]
        return tool.prepare(tool.parse_arguments([*arguments, "--images", "2", *opts]))

    return make


def make_picture(parts, height=48, width=64, boxes=(), classes=()):
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    image = np.full((height, width, 3), GREY, np.uint8)
    return parts.picture.Picture(image, instances, ["cat", "dog"])


def make_batch(height=48, width=64):
    return Batch([{"image": torch.zeros(3, height, width)}], PADDED, 0, 10)


class Maps:
    """A view of a detector with these levels."""

    def __init__(self, levels):
        self.levels = levels

    def level(self, name, contiguous=True):
        return self.levels[name]


# What is at a pixel.


def is_colour(image, colour):
    """(H, W) bool."""
    return (np.abs(image.astype(float) - np.array(to_rgb(colour)) * 255) < 12).all(axis=-1)


def edge(image, colour, box, zoom=ZOOM):
    """How much of each side of the box (left, top, right, bottom) has the colour, 0 to 1."""
    height, width = image.shape[:2]
    x1, y1, x2, y2 = (round(v * zoom) for v in box)
    # The line's centre lies between two pixels; at the image's border half of it is cut off.
    mask = is_colour(image, colour)
    near = mask | np.roll(mask, -1, 0) | np.roll(mask, -1, 1) | np.roll(mask, (-1, -1), (0, 1))
    rows, columns = slice(y1 + 4, y2 - 4), slice(x1 + 4, x2 - 4)
    left, right = (near[rows, min(max(x - 1, 0), width - 2)] for x in (x1, x2))
    top, bottom = (near[min(max(y - 1, 0), height - 2), columns] for y in (y1, y2))
    return [side.mean() for side in (left, top, right, bottom)]


def outside_edges(image, colour, boxes, zoom=ZOOM, reach=5):
    """Number of pixels of this colour that are farther than ``reach`` pixels from all sides of boxes."""
    mask = is_colour(image, colour)
    for box in boxes:
        x1, y1, x2, y2 = (round(v * zoom) for v in box)
        frame = np.zeros_like(mask)
        frame[max(y1 - reach, 0) : y2 + reach, max(x1 - reach, 0) : x2 + reach] = True
        frame[y1 + reach : y2 - reach, x1 + reach : x2 - reach] = False
        mask = mask & ~frame
    return int(mask.sum())


def hottest_box(image):
    """XYXY in pixels of the image of where a heat map on grey is hottest."""
    top, bottom = colormaps["inferno"]([1.0, 0.0])[:, :3] * 255 * 0.65 + 0.35 * GREY
    distance = [np.abs(image - colour).sum(axis=-1) for colour in (top, bottom)]
    rows, columns = np.nonzero(distance[0] < distance[1])
    if not len(rows):
        return None
    ends = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    return [end / ZOOM for end in ends]


# Boxes.


def test_boxes_are_where_they_should_be_and_nowhere_else(parts):
    marks = [
        parts.picture.Mark([8, 6, 30, 40], parts.picture.SKY),
        parts.picture.Mark([35, 10, 60, 30], parts.picture.YELLOW, dashed=True),
    ]
    image = make_picture(parts).boxes(marks)
    assert image.shape == (480, 640, 3)
    assert edge(image, parts.picture.SKY, marks[0].box) == [1.0] * 4
    assert all(0.4 < part < 0.95 for part in edge(image, parts.picture.YELLOW, marks[1].box))
    for mark in marks:
        assert outside_edges(image, mark.colour, [mark.box]) == 0
        assert is_colour(image, mark.colour).sum() > 1000


def test_the_first_box_is_on_top(parts):
    p, box = parts.picture, [10, 10, 40, 40]
    image = make_picture(parts).boxes([p.Mark(box, p.SKY), p.Mark(box, p.YELLOW)])
    assert edge(image, p.SKY, box) == [1.0] * 4 and not is_colour(image, p.YELLOW).any()


@pytest.mark.parametrize("size", [(96, 96), (48, 64), (800, 1333), (600, 400)])
def test_panels_are_of_readable_size_whatever_the_image(parts, size):
    height, width = size
    box = [width * 0.25, height * 0.25, width * 0.75, height * 0.75]
    image = make_picture(parts, *size).boxes([parts.picture.Mark(box, parts.picture.SKY)])
    assert min(image.shape[:2]) == 480
    zoom = 480 / min(size)
    assert image.shape[:2] == (round(height * zoom), round(width * zoom))
    assert edge(image, parts.picture.SKY, box, zoom) == [1.0] * 4


def test_ground_truth_has_all_boxes_and_names(parts, monkeypatch):
    boxes = [[4, 4, 20, 24], [20, 20, 60, 44], [40, 2, 62, 14]]
    picture = make_picture(parts, boxes=boxes, classes=[0, 1, 5])
    panel = picture.ground_truth()
    assert panel.title == "ground truth (3)"
    assert all(part > 0.6 for box in boxes for part in edge(panel.image, parts.picture.GREEN, box))
    labels = []
    monkeypatch.setattr(parts.picture.Picture, "boxes", lambda _, marks: labels.extend(marks))
    picture.ground_truth()
    assert [mark.label for mark in labels] == ["cat", "dog", "class 5"]


def test_labels_give_way_to_each_other_and_stay_inside(parts):
    canvas, box, taken = SimpleNamespace(width=640, height=480), np.array([5.0, 3.0, 300.0, 200.0]), []
    for _ in range(4):
        taken.append(parts.picture._free_place(box, "0.83", taken, canvas))
    for index, place in enumerate(taken):
        assert (place >= 0).all() and place[2] <= 640 and place[3] <= 480
        assert all(parts.picture._overlap(place, other) == 0 for other in taken[:index])


# Heat maps.


def test_heat_map_is_hot_at_the_planted_cell(parts):
    values = torch.zeros(8, 8)
    values[2, 5] = 1.0
    scale = parts.picture.ColourScale("", 1.0)
    image = make_picture(parts).heat(values, PADDED, scale)
    assert image.shape == (480, 640, 3)
    assert hottest_box(image) == pytest.approx([40, 16, 48, 24], abs=0.2)


def test_padding_is_cut_off(parts):
    values = torch.zeros(8, 8)
    values[6:] = 1.0  # of 48 rows of pixels, the level's first six
    picture, scale = make_picture(parts), parts.picture.ColourScale("", 1.0)
    assert hottest_box(picture.heat(values, PADDED, scale)) is None
    assert picture.visible(values, PADDED).shape == (6, 8)
    assert picture.visible(torch.zeros(3, 3), (72, 72)).shape == (2, 3)  # the last cells in part


def test_one_scale_for_all_levels(parts):
    errors = {name: torch.zeros(1, 2, 8, 8) for name in ("p3", "p4")}
    errors["p3"][0, :, 1, 2] = 1.0
    errors["p4"][0, :, 4, 4] = torch.tensor([0.0, 16.0])  # the mean over channels counts
    errors["p4"][0, :, 7, 7] = 1000.0  # in the padding
    row = parts.error_maps.error_row(errors, make_batch(), make_picture(parts), "distance")
    assert row.scale.top == 8.0
    titles = ["ground truth (0)", "p3: mean 0.0208", "p4: mean 0.167"]
    assert [panel.title for panel in row.panels] == titles
    assert hottest_box(row.panels[1].image) is None
    assert hottest_box(row.panels[2].image) == pytest.approx([32, 32, 40, 40], abs=0.2)


def planted(seed=0):
    """Maps of two levels, equal but for one position of p3."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"p3": (1, 4, 8, 8), "p4": (1, 4, 4, 4)}
    teacher = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    student = {name: level.clone() for name, level in teacher.items()}
    student["p3"][0, :, 3, 6] += 5.0
    return student, teacher


@pytest.mark.parametrize("method", ["mimic", "pkd"])
def test_planted_error_is_seen_where_it_is(tool, parts, method):
    loss = {"mimic": FeatureMimic, "pkd": PKD}[method](in_features=["p3", "p4"])
    student, teacher = planted()
    draw = tool.load_methods()[method].draw
    [row] = draw(loss, Maps(student), Maps(teacher), make_batch(), make_picture(parts))
    assert [panel.title.split(":")[0] for panel in row.panels[1:]] == ["p3", "p4"]
    assert hottest_box(row.panels[1].image) == pytest.approx([48, 24, 56, 32], abs=0.2)
    assert hottest_box(row.panels[2].image) is None


def spy_errors(monkeypatch, module):
    """What a method gives to ``error_row``."""
    seen = []
    monkeypatch.setattr(module, "error_row", lambda errors, *_: seen.append(errors))
    return seen


@pytest.mark.parametrize("form", ["L2", "L1", "smoothL1"])
@pytest.mark.parametrize("normalize", ["none", "channel", "level"])
def test_mimic_draws_the_terms_of_its_loss(parts, monkeypatch, form, normalize):
    loss = FeatureMimic(in_features=["p3", "p4"], loss_form=form, normalize=normalize)
    (student, _), (_, teacher) = planted(0), planted(1)
    views = Maps(student), Maps(teacher)
    seen = spy_errors(monkeypatch, parts.mimic)
    parts.mimic.mimic(loss, *views, None, None)
    drawn = torch.stack([error.mean() for error in seen[0].values()]).mean()
    torch.testing.assert_close(drawn, loss(*views, None)["loss_feature_mimic"])


def test_pkd_draws_the_terms_of_its_loss(parts, monkeypatch):
    loss = PKD(in_features=["p3", "p4"])
    (student, _), (_, teacher) = planted(0), planted(1)
    views = Maps(student), Maps(teacher)
    seen = spy_errors(monkeypatch, parts.pkd)
    parts.pkd.pkd(loss, *views, None, None)
    drawn = torch.stack([error.mean() / 2 for error in seen[0].values()]).sum()
    torch.testing.assert_close(drawn, loss(*views, None)["loss_pkd"])


def test_errors_are_of_the_detectors_in_a_step(tool, parts, make_job, monkeypatch):
    job = make_job("pkd")
    assert next(iter(job.items.values()))["image"].shape == (3, 64, 48)
    seen = []
    monkeypatch.setattr(
        parts.pkd, "error_row", lambda errors, *_: seen.append(errors) or parts.picture.Row([])
    )
    terms = []
    job.distiller.losses["PKD"].register_forward_hook(lambda _m, _i, output: terms.append(output))
    tool.draw(job, next(iter(job.items.values())))
    assert list(seen[0]) == ["p2", "p3", "p4"]
    drawn = torch.stack([error.mean() / 2 for error in seen[0].values()]).sum()
    torch.testing.assert_close(drawn, terms[0]["loss_pkd"])


# DeFeat and FGFI.


@pytest.mark.parametrize("method", ["defeat", "fgfi"])
def test_masks_and_distances_are_the_terms_of_the_loss(tool, parts, make_job, monkeypatch, method):
    job = make_job(method, "MODEL.DISTILLER.DEFEAT.LOSS_FORM", "L1")
    errors, masks, terms = [], [], []
    monkeypatch.setattr(
        parts.regions, "error_row", lambda drawn, *_: errors.append(drawn) or parts.picture.Row([])
    )
    heat = parts.picture.Picture.heat

    def spy(picture, values, padded, scale):
        masks.append(values)
        return heat(picture, values, padded, scale)

    monkeypatch.setattr(parts.picture.Picture, "heat", spy)
    loss = job.distiller.losses[METHODS[method]]
    loss.register_forward_hook(lambda _m, _i, output: terms.append(output))
    tool.draw(job, next(iter(job.items.values())))
    assert list(errors[0]) == ["p2", "p3", "p4"] and len(masks) == 3
    assert 0 < sum(mask.sum() for mask in masks) < sum(mask.numel() for mask in masks)
    means = [
        (mask * error[0].mean(dim=0)).sum() / (2 * mask.sum()).clamp(min=1 / error.shape[1])
        for mask, error in zip(masks, errors[0].values())
    ]
    name, weight = {"defeat": ("loss_defeat_neck", 3.0), "fgfi": ("loss_fgfi", 1.0)}[method]
    torch.testing.assert_close(weight * torch.stack(means).mean(), terms[0][name])


def test_defeat_of_heads_alone_has_no_levels_to_draw(tool, parts, make_job):
    opts = ["HINT_NECK_W", "0.0", "HINT_NECK_BACK_W", "0.0", "HEAD_CLS_W", "1.0"]
    keys = [f"MODEL.DISTILLER.DEFEAT.{word}" if word.isupper() else word for word in opts]
    job = make_job("defeat", *keys)
    (row,) = tool.draw(job, next(iter(job.items.values())))
    assert len(row.panels) == 1 and "HINT_NECK_W" in row.panels[0].title


# GID.

SELECTED = GeneralInstances(
    boxes=torch.tensor(
        [[[4, 4, 24, 20], [30, 4, 60, 20], [4, 25, 24, 44], [30, 26, 44, 44], [50, 30, 62, 46]]],
        dtype=torch.float32,
    ),
    scores=torch.tensor([[0.834, 0.71, 0.5, 0.25, 0.9]]),
    rows=torch.zeros(1, 5, dtype=torch.int64),
    from_teacher=torch.tensor([[True, False, True, True, True]]),
    valid=torch.tensor([[True, True, True, True, False]]),
)
SELECTED_KINDS = {
    "pos": torch.tensor([[True, False, False, False, False]]),
    "semi_pos": torch.tensor([[False, True, False, False, False]]),
    "neg": torch.tensor([[False, False, True, False, False]]),
}


def test_instances_are_drawn_by_kind(parts):
    p = parts.picture
    row = parts.gid.selection_row(SELECTED, SELECTED_KINDS, "all", make_picture(parts))
    image, boxes = row.panels[1].image, SELECTED.boxes[0].tolist()
    colours = [p.SKY, p.YELLOW, p.VERMILLION, p.WHITE]
    for slot, colour in enumerate(colours):
        sides = edge(image, colour, boxes[slot])
        # Labels above the box touch its upper side.
        assert min(sides) > 0.4 and (max(sides) == 1.0) == (slot != 1)
        others = [box for index, box in enumerate(boxes) if index != slot]
        assert all(max(edge(image, colour, box)) < 0.1 for box in others)
    assert row.panels[1].title.startswith("4 general instances")
    labels = [entry.label for entry in row.legend]
    assert labels[:4] == ["positive (1)", "semi-positive (1)", "negative (1)", "none of them (1)"]
    assert [entry.colour for entry in row.legend[:4]] == colours and row.legend[4].dashed


def test_instances_have_their_scores(parts, monkeypatch):
    seen = []
    picture = make_picture(parts)
    image = picture.boxes([])
    monkeypatch.setattr(parts.picture.Picture, "boxes", lambda _, marks: seen.append(marks) or image)
    parts.gid.selection_row(SELECTED, SELECTED_KINDS, "all", picture)
    assert [mark.label for mark in seen[-1]] == ["0.83", "0.71", "0.50", "0.25"]


def on_grey(tool, parts, monkeypatch):
    """The detectors see an image of noise; what is drawn on it is drawn on grey instead."""
    real = tool.picture_of

    def picture_of(job, item):
        picture = real(job, item)
        blank = np.full_like(picture.image, GREY)
        return parts.picture.Picture(blank, picture.instances, picture.classes)

    monkeypatch.setattr(tool, "picture_of", picture_of)


@pytest.mark.parametrize("family", ["retinanet", "faster"])
def test_ground_truth_as_instances_is_drawn_once(
    tool, parts, make_job, write_config, monkeypatch, family
):
    options = ["MODEL.DISTILLER.GID.GI_MODE", "gt"]
    job = make_job("gid", *options, config_file=write_config(family))
    item = list(job.items.values())[1]
    on_grey(tool, parts, monkeypatch)
    [row] = tool.draw(job, item)
    [panel], boxes = row.panels, item["instances"].gt_boxes.tensor.tolist()
    assert panel.title == f"instances are the ground truth, GI_MODE gt ({len(boxes)})"
    for box in boxes:
        assert min(edge(panel.image, parts.picture.GREEN, box)) > 0.4


@pytest.mark.parametrize("mode", ["all", "pos"])
@pytest.mark.parametrize("family", ["retinanet", "faster"])
def test_the_loss_s_own_selection_is_drawn(
    tool, parts, make_job, write_config, monkeypatch, family, mode
):
    options = ["MODEL.DISTILLER.GID.GI_MODE", mode, "MODEL.DISTILLER.GID.GI_MIN_SIDE", "4.0"]
    job = make_job("gid", *options, config_file=write_config(family))
    loss, seen = job.distiller.losses["GID"], []
    select = loss.instances
    monkeypatch.setattr(loss, "instances", lambda *args: seen.append(select(*args)) or seen[-1])
    kinds, classify = [], loss.categories
    monkeypatch.setattr(loss, "categories", lambda *args: kinds.append(classify(*args)) or kinds[-1])
    item = list(job.items.values())[1]
    on_grey(tool, parts, monkeypatch)
    [row] = tool.draw(job, item)
    used, shown = seen[-1], seen[0]  # by the loss, and by the picture
    assert all(torch.equal(value, vars(shown)[name]) for name, value in vars(used).items())
    boxes = shown.boxes[0][shown.valid[0]]
    assert row.panels[1].title.startswith(f"{len(boxes)} general instances")
    if mode == "all":
        p, image = parts.picture, row.panels[1].image
        assert len(boxes) >= 2
        colours = [p.SKY, p.YELLOW, p.VERMILLION, p.WHITE]
        counts = [int(mask.sum()) for mask in kinds[0].values()]
        counts.append(len(boxes) - sum(counts))
        labels = [entry.label for entry in row.legend[:4]]
        assert [label.endswith(f"({count})") for label, count in zip(labels, counts)] == [True] * 4
        assert sum(counts[:3]) > 0
        best = [max(edge(image, c, boxes[0].tolist())) for c in colours]  # on top
        assert max(best) > 0.3
        assert sum(outside_edges(image, c, boxes.tolist(), reach=24) for c in colours[:3]) == 0


# ICD.


def plant_attention(loss, monkeypatch, level, cells):
    """The decoder's last layer looks for instance n at the n-th of these cells of one level."""

    def decode(maps, queries, geometry, _iteration):
        sizes = [height * width for height, width in geometry.level_sizes]
        columns = geometry.level_sizes[level][1]
        positions = [sum(sizes[:level]) + row * columns + column for row, column in cells]

        def logits(_image, slots, _temperature):
            values = torch.full((2, len(cells), sum(sizes)), -20.0)
            values[:, range(len(cells)), positions] = 20.0
            return values[:, slots]

        return [None, SimpleNamespace(logits=logits)]

    monkeypatch.setattr(loss, "decode", decode)


def make_item(boxes, classes):
    instances = Instances((48, 64))
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
    instances.gt_classes = torch.tensor(classes)
    return {"image": torch.full((3, 48, 64), GREY, dtype=torch.uint8), "instances": instances}


@pytest.mark.parametrize("level,side", [(0, 4), (1, 8)])
def test_attention_peaks_where_it_was_planted(tool, make_job, monkeypatch, level, side):
    job = make_job("icd", *ICD_OPTIONS)
    cells = [(1, 2), (3, 6)]
    plant_attention(job.distiller.losses[ICD], monkeypatch, level, cells)
    # The loss itself cannot go on with it.
    monkeypatch.setattr(job.distiller.losses[ICD], "forward", lambda *_: {})
    rows = tool.draw(job, make_item([[2, 2, 10, 12], [30, 4, 60, 40]], [0, 1]))
    assert len(rows) == 2
    for row, (y, x) in zip(rows, cells[::-1]):  # the largest first
        assert [panel.title.split(":")[0] for panel in row.panels[1:]] == ["p2", "p3", "p4"]
        assert row.panels[1 + level].title.endswith(" 100% of the attention")
        image = row.panels[1 + level].image
        cell = np.zeros(image.shape[:2], bool)
        cell[y * side * ZOOM : (y + 1) * side * ZOOM, x * side * ZOOM : (x + 1) * side * ZOOM] = True
        top = np.array(colormaps["inferno"](1.0)[:3]) * 255 * 0.65 + 0.35 * GREY
        hot = np.abs(image - top).sum(axis=-1) < 30
        assert hot[cell].mean() > 0.75  # the instance's box may cross it
        assert hot[~cell].sum() == 0


def test_a_row_for_each_of_the_largest_instances(tool, parts, make_job):
    job = make_job("icd", *ICD_OPTIONS)
    boxes = [[4, 4, 10 + 4 * index, 12 + 4 * index] for index in range(7)]
    item = make_item(boxes, [0, 1, 2, 0, 1, 2, 0])
    rows = tool.draw(job, item)
    expected = ["class0", "class2", "class1", "class0", "class2"]
    titles = [f"{name}, {rank} of 7 by size" for rank, name in enumerate(expected, start=1)]
    assert [row.panels[0].title for row in rows] == titles
    for row, box in zip(rows, boxes[::-1]):
        assert min(edge(row.panels[0].image, parts.picture.SKY, box)) > 0.4
        assert min(edge(row.panels[1].image, parts.picture.SKY, box)) > 0.9
        shares = [float(panel.title.split()[1].rstrip("%")) for panel in row.panels[1:]]
        assert sum(shares) == pytest.approx(100, abs=2)
    [row] = tool.draw(job, {**item, "instances": item["instances"][:0]})
    assert [panel.title for panel in row.panels] == ["ground truth (0)"]


def test_the_decoder_comes_from_the_student_s_checkpoint(tool, make_job, folder, tmp_path, caplog):
    job = make_job("icd", *ICD_OPTIONS)
    assert "RANDOM parameters" in caplog.text and "RANDOM" in job.detectors[1]
    weights = torch.load(folder / "retinanet_student.pth")
    decoder = job.distiller.losses[ICD].state_dict()
    state = {f"{ICD}.{key}": torch.full_like(value, 0.25) for key, value in decoder.items()}
    path = str(tmp_path / "distilled.pth")
    torch.save({**weights, "distiller": state}, path)
    caplog.clear()
    job = make_job("icd", *ICD_OPTIONS, "MODEL.WEIGHTS", path)
    assert all((value == 0.25).all() for value in job.distiller.losses[ICD].state_dict().values())
    assert "RANDOM" not in caplog.text + job.detectors[1]
    assert job.detectors[1].endswith("distilled.pth")
    preload = ["MODEL.DISTILLER.PRELOAD_TEACHER", path, "MODEL.DISTILLER.PRELOAD_FPN", "True"]
    job = make_job("icd", *ICD_OPTIONS, *preload)
    assert (job.distiller.losses[ICD].decoder[0].in_proj_weight == 0.25).all()
    ours = job.distiller.student.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in weights["model"].items())
    with pytest.raises(ValueError, match="has other settings than the config"):
        make_job("icd", "MODEL.DISTILLER.INS.HIDDEN_DIM", "32", "MODEL.WEIGHTS", path)


# The whole program.


def run(tool, config, method, output, *more):
    return tool.main(["--config-file", config, "--method", method, "--output", str(output), *more])


@pytest.mark.parametrize(
    "method,images",
    [
        *[("defeat", [0]), ("fgfi", [0])],
        *[("gid", [0, 2, 4]), ("icd", [0]), ("mimic", [0]), ("pkd", [0, 3])],
    ],
)
def test_writes_a_picture_per_image(tool, parts, config, method, images, tmp_path, capsys):
    more = ["--images", str(len(images)), *(ICD_OPTIONS if method == "icd" else [])]
    files = run(tool, config, method, tmp_path / "new" / "folder", *more)
    assert [Path(file).name for file in files] == [f"{index}_{method}.png" for index in images]
    assert capsys.readouterr().out.splitlines()[-len(images) :] == files
    sizes = {"defeat": (4, 2), "fgfi": (4, 2), "gid": (2, 1), "icd": (4, 2)}
    panels, rows = sizes.get(method, (4, 1))
    for file, index in zip(files, images):
        panel = (480, 640) if index % 2 else (640, 480)
        height, width = cv2.imread(file).shape[:2]
        assert panels * panel[1] < width < panels * (panel[1] + 30) + 150
        assert rows * panel[0] < height < rows * (panel[0] + 80) + 130
        colour = parts.picture.SKY if method == "icd" else parts.picture.GREEN
        assert is_colour(cv2.imread(file)[..., ::-1], colour).sum() > 1500


def test_pictures_are_never_overwritten(tool):
    records = [{"file_name": name} for name in ("a/0.png", "b/0.png", "b/1.png", "c/0.png")]
    assert tool.file_stems(records) == ["0", "0_2", "1", "0_3"]


def test_no_more_images_than_there_are(tool, config):
    items = tool.load_items(tool.load_config(config), 100)
    assert list(items) == [str(index) for index in range(6)]
    assert all(len(item["instances"]) == 2 for item in items.values())


def test_images_have_the_size_that_the_config_wants(tool, config):
    items = tool.load_items(tool.load_config(config, ["INPUT.FIXED_SIZE", "[50, 90]"]), 2)
    for item in items.values():
        assert item["image"].shape == (3, 50, 90) and item["instances"].image_size == (50, 90)


def test_the_panels_are_in_the_picture_as_they_are(parts):
    p = parts.picture
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (480, 500, 3), dtype=np.uint8) for _ in range(3)]
    rows = [
        p.Row([p.Panel("left", images[0]), p.Panel("right", images[1])], p.ColourScale("x", 2.0)),
        p.Row([p.Panel("below", images[2])], legend=[p.LegendEntry("y", p.SKY)]),
    ]
    sheet = parts.sheet.compose(rows, ["header $1", "line"])
    places = []
    for image in images:
        found = cv2.matchTemplate(sheet, image, cv2.TM_SQDIFF)
        x, y = cv2.minMaxLoc(found)[2]
        assert (sheet[y : y + 480, x : x + 500] == image).all()
        places.append((x, y))
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x1 >= x0 + 500 and y1 == y0 and x2 == x0 and y2 >= y0 + 480
    assert (sheet[:y0] < 128).any()  # the header
    legend = sheet[y2 + 480 :]
    assert is_colour(legend, p.SKY).sum() > 20
    bar = sheet[y0 : y0 + 480, x1 + 500 + 14 :]
    hottest, coldest = (tuple(np.array(colormaps["inferno"](v)[:3]) * 255) for v in (1.0, 0.0))
    assert np.abs(bar[5, 5] - hottest).max() < 30 and np.abs(bar[-6, 5] - coldest).max() < 30


def test_drawing_leaves_the_student_as_it_is(tool, make_job, config, folder):
    job = make_job("pkd")
    before = {k: v.clone() for k, v in job.distiller.state_dict().items()}
    loaded = torch.load(folder / "retinanet_student.pth")["model"]
    assert all(torch.equal(before[name], value) for name, value in loaded.items())
    for item in job.items.values():
        tool.draw(job, item)
    after = job.distiller.state_dict()
    assert all(torch.equal(before[name], value) for name, value in after.items())


def test_the_student_s_norms_do_not_see_the_image_alone(tool, make_job):
    """As in evaluation: what is drawn are the features with which the student detects."""
    job = make_job("pkd", "MODEL.RETINANET.NORM", "BN", "MODEL.WEIGHTS", "")
    norms = [m for m in job.distiller.student.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and job.distiller.student.training and not any(norm.training for norm in norms)
    counts = [int(norm.num_batches_tracked) for norm in norms]
    tool.draw(job, job.items["0"])
    assert counts == [int(norm.num_batches_tracked) for norm in norms]


def test_a_loss_that_is_off_is_drawn_all_the_same(tool, make_job):
    off = ["MODEL.DISTILLER.PKD.WEIGHT", "0.0", "MODEL.DISTILLER.PKD.STOP_ITER", "1"]
    job = make_job("pkd", *off, "MODEL.DISTILLER.PRETRAIN_TEACHER_ITERS", "100")
    [row] = tool.draw(job, job.items["0"])
    assert len(row.panels) == 4


def test_colours_are_those_of_the_file(tool, make_job, tmp_path):
    """An RGB student's picture has the same colours as a BGR student's."""
    pictures = []
    for channels in ("BGR", "RGB"):
        job = make_job("pkd", "INPUT.FORMAT", channels)
        pictures.append(tool.picture_of(job, job.items["3"]).image)
    assert (pictures[0] == pictures[1]).all()
    assert pictures[0][..., 0].mean() != pictures[0][..., 2].mean()


# Wrong input: one message.


def refused(tool, config, *more, method="pkd", output):
    with pytest.raises(SystemExit) as stopped:
        run(tool, config, method, output, *more)
    return stopped.value.code


def test_unknown_method(tool, config, tmp_path, capsys):
    assert refused(tool, config, method="nothing", output=tmp_path) == 2
    message = capsys.readouterr().err
    assert "nothing" in message and all(method in message for method in METHODS)


def test_no_images(tool, config, tmp_path, capsys):
    assert refused(tool, config, "--images", "0", output=tmp_path) == 2
    assert "--images 0: expected at least 1" in capsys.readouterr().err


def test_output_that_cannot_be_written(tool, config, tmp_path):
    (tmp_path / "file").write_text("")
    message = refused(tool, config, output=tmp_path / "file" / "folder")
    assert "--output" in message and "cannot be written to" in message


@pytest.mark.parametrize(
    "options,expected",
    [
        (["MODEL.WEIGHTS", "missing.pth"], "checkpoint 'missing.pth' does not exist"),
        (["MODEL.DISTILLER.TEACHER_WEIGHTS", "missing.pth"], "weights 'missing.pth' do not exist"),
        (["MODEL.SMALL_RESNET.STEM_WIDTH", "10"], "is no checkpoint of this student: "),
        (["MODEL.NOTHING", "1"], "unknown config key 'MODEL.NOTHING'"),
        (["DATASETS.TEST", "('nothing',)"], "names 'nothing', which is not registered"),
        (["DATASETS.TEST", "()"], "no image has annotations"),
    ],
)
def test_wrong_configs(tool, config, tmp_path, options, expected):
    message = refused(tool, config, *options, output=tmp_path)
    assert message.startswith("visualize_distillation: ") and expected in message
    assert not list(tmp_path.glob("*.png"))


def test_lazy_configs(tool, tmp_path):
    message = refused(tool, "model.py", output=tmp_path)
    assert "model.py: a LazyConfig; only yaml configs can be drawn" in message


def test_a_dataset_without_annotations(tool, config, tmp_path):
    name, image = "visualize_unlabelled", {"file_name": str(tmp_path / "0.png"), "height": 8, "width": 8}
    cv2.imwrite(image["file_name"], np.zeros((8, 8, 3), np.uint8))
    DatasetCatalog.register(name, lambda: [dict(image)])
    try:
        message = refused(tool, config, "DATASETS.TEST", str((name,)), output=tmp_path / "output")
    finally:
        DatasetCatalog.remove(name)
    assert f"DATASETS.TEST ['{name}']: no image has annotations" in message


def test_an_image_that_cannot_be_read(tool, config, tmp_path):
    entry = write_dataset(tmp_path / "broken")
    (tmp_path / "broken" / "images" / "0.png").write_bytes(b"no image")
    options = ["DATASETS.CUSTOM", str([entry]), "DATASETS.TEST", str((entry["NAME"],))]
    message = refused(tool, config, *options, output=tmp_path / "output")
    assert "0.png' or its annotations cannot be used" in message
