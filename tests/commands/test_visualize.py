"""distill-d2 visualize: that pictures show what the losses say, where they say it."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from matplotlib import colormaps
from matplotlib.colors import to_rgb

from distill_d2 import cli
from distill_d2.commands.visualize import add_arguments
from distill_d2.config import student_config
from distill_d2.losses.feature_mimic import FeatureMimic
from distill_d2.losses.gid import GeneralInstances
from distill_d2.losses.pkd import PKD
from distill_d2.testing import distiller_config, save_teacher, tiny_config, use_dataset, write_dataset
from distill_d2.views import Batch
from distill_d2.visualize import error_maps, mimic, pkd, regions, sheet
from distill_d2.visualize import job as tool
from distill_d2.visualize.gid import selection_row
from distill_d2.visualize.picture import (
    GREEN,
    SKY,
    VERMILION,
    WHITE,
    YELLOW,
    ColorScale,
    LegendEntry,
    Mark,
    Picture,
    Row,
)

METHODS = {
    "at": "AT",
    "defeat": "DeFeat",
    "fgd": "FGD",
    "fgfi": "FGFI",
    "gid": "GID",
    "icd": "InstanceConditionalDistillation",
    "mgd": "MGD",
    "mimic": "FeatureMimic",
    "pkd": "PKD",
    "reviewkd": "ReviewKD",
}
ICD = METHODS["icd"]
ICD_OPTIONS = ["MODEL.DISTILLER.INS.HIDDEN_DIM", "16", "MODEL.DISTILLER.INS.ATT_HEADS", "2"]
GRAY = 128
PADDED = (64, 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("visualize")


@pytest.fixture(scope="module")
def write_config(folder):
    """Writes the config of a distillation on six images, with checkpoints of both; returns its path."""

    def write(family="retinanet"):
        cfg = tiny_config(family)
        use_dataset(cfg, write_dataset(folder / "data"))
        teacher = save_teacher(tiny_config(family, width=12), folder / f"{family}_teacher")
        cfg = distiller_config(cfg, teacher)
        cfg.VERSION = 2
        cfg.MODEL.WEIGHTS = str(folder / f"{family}_student.pth")
        torch.save({"model": build_model(student_config(cfg)).state_dict()}, cfg.MODEL.WEIGHTS)
        path = folder / f"{family}.yaml"
        path.write_text(cfg.dump())
        return str(path)

    return write


@pytest.fixture(scope="module")
def config(write_config):
    return write_config()


def parsed(words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([*words[:6], "--device", "cpu", *words[6:]])


@pytest.fixture
def make_job(config, tmp_path):
    """Builds what the program draws."""

    def make(method, *opts, config_file=config):
        arguments = ["--config-file", config_file, "--method", method, "--output", str(tmp_path)]
        return tool.prepare(parsed([*arguments, "--images", "2", *opts]))

    return make


def make_picture(height=48, width=64, boxes=(), classes=()):
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    return Picture(np.full((height, width, 3), GRAY, np.uint8), instances, ["cat", "dog"])


# The whole program.


def run(config, method, output, *more):
    words = ["--config-file", config, "--method", method, "--output", str(output), *more]
    return cli.main(["visualize", "--device", "cpu", *words])


@pytest.mark.parametrize(
    "method, images",
    [(m, [0]) for m in ("defeat", "fgfi", "icd", "mgd", "mimic", "reviewkd")]
    + [("gid", [0, 2, 4]), ("pkd", [0, 3])],
)
def test_writes_a_picture_per_image(config, method, images, tmp_path, capsys):
    more = ["--images", str(len(images)), *(ICD_OPTIONS if method == "icd" else [])]
    assert run(config, method, tmp_path / "new" / "folder", *more) == 0
    files = capsys.readouterr().out.splitlines()[-len(images) :]
    assert [Path(file).name for file in files] == [f"{index}_{method}.png" for index in images]
    color = np.array(to_rgb(SKY if method == "icd" else GREEN)) * 255
    for file in files:
        assert (np.abs(cv2.imread(file)[..., ::-1] - color).max(axis=-1) < 12).sum() > 500


def refused(config, *more, method="pkd", output):
    with pytest.raises(SystemExit) as stopped:
        run(config, method, output, *more)
    assert stopped.value.code == 2
    return str(stopped.value)


@pytest.mark.parametrize(
    "options, expected",
    [
        (["MODEL.WEIGHTS", "missing.pth"], "checkpoint 'missing.pth' does not exist"),
        (["MODEL.DISTILLER.TEACHER_WEIGHTS", "missing.pth"], "weights 'missing.pth' do not exist"),
        (["MODEL.SMALL_RESNET.STEM_WIDTH", "10"], "is not a checkpoint of this student: "),
        (["MODEL.NOTHING", "1"], "unknown config key 'MODEL.NOTHING'"),
        (["DATASETS.TEST", "('nothing',)"], "names 'nothing', which is not registered"),
        (["DATASETS.TEST", "()"], "no image has annotations"),
        (
            ["--config-file", "Distillation-GID/fcos_R_50_R101_gid_FPN_1x.py"],
            "a LazyConfig; only yaml configs can be drawn",
        ),
    ],
)
def test_wrong_input(config, tmp_path, options, expected):
    message = refused(config, *options, output=tmp_path)
    assert message.startswith("distill-d2 visualize: ") and expected in message
    assert not list(tmp_path.glob("*.png"))


def test_wrong_arguments(config, tmp_path):
    message = refused(config, method="nothing", output=tmp_path)
    assert all(name in message for name in ("nothing", *METHODS))
    assert "--images 0: expected at least 1" in refused(config, "--images", "0", output=tmp_path)
    (tmp_path / "file").write_text("")
    message = refused(config, output=tmp_path / "file" / "folder")
    assert "--output" in message and "cannot be written to" in message


def test_pictures_are_replaced_on_request_alone(config, tmp_path):
    (tmp_path / "3_pkd.png").write_text("mine")
    message = refused(config, "--images", "2", output=tmp_path)
    assert "1 of 2 pictures exist" in message and "--overwrite" in message
    assert [path.name for path in tmp_path.iterdir()] == ["3_pkd.png"]
    run(config, "pkd", tmp_path, "--overwrite", "--images", "2")
    assert (tmp_path / "3_pkd.png").stat().st_size > 1000


# Images and detectors.


def test_images_and_the_names_of_their_pictures(config):
    records = [{"file_name": name} for name in ("a/0.png", "b/0.png", "b/1.png", "c/0.png")]
    assert tool.file_stems(records) == ["0", "0_2", "1", "0_3"]
    items = tool.load_items(tool.load_config(config, ["INPUT.FIXED_SIZE", "[50, 90]"]), 100)
    assert list(items) == [str(index) for index in range(6)]
    for item in items.values():
        assert len(item["instances"]) == 2 and item["instances"].image_size == (50, 90)
        assert item["image"].shape == (3, 50, 90)


def test_drawing_leaves_the_student_as_it_is(make_job, folder):
    """Its norms do not see the image alone: what is drawn are the features with which it detects; a loss that
    is off is drawn all the same."""
    norms = ["MODEL.RETINANET.NORM", "BN", "MODEL.WEIGHTS", ""]
    off = ["MODEL.DISTILLER.PKD.WEIGHT", "0.0", "MODEL.DISTILLER.PKD.STOP_ITER", "1"]
    for options in ([], norms):
        job = make_job("pkd", *off, "MODEL.DISTILLER.PRETRAIN_TEACHER_ITERS", "100", *options)
        before = {k: v.clone() for k, v in job.distiller.state_dict().items()}
        if not options:
            loaded = torch.load(folder / "retinanet_student.pth")["model"]
            assert all(torch.equal(before[name], value) for name, value in loaded.items())
        [row] = tool.draw(job, job.items["0"])
        assert len(row.panels) == 4
        after = job.distiller.state_dict()
        assert all(torch.equal(before[name], value) for name, value in after.items())
    assert job.distiller.student.training
    assert any("num_batches_tracked" in name for name in before)


def test_colors_are_those_of_the_file(make_job):
    """An RGB student's picture has the same colors as a BGR student's."""
    pictures = []
    for channels in ("BGR", "RGB"):
        job = make_job("pkd", "INPUT.FORMAT", channels)
        pictures.append(tool.picture_of(job, job.items["3"]).image)
    assert (pictures[0] == pictures[1]).all()
    assert pictures[0][..., 0].mean() != pictures[0][..., 2].mean()


def test_the_decoder_comes_from_the_students_checkpoint(make_job, folder, tmp_path, caplog):
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
    student = job.distiller.student.state_dict()
    assert all(torch.equal(student[name], value) for name, value in weights["model"].items())
    with pytest.raises(ValueError, match="has other settings than the config"):
        make_job("icd", "MODEL.DISTILLER.INS.HIDDEN_DIM", "32", "MODEL.WEIGHTS", path)


# The figure.


def pixels_of(figure, panel):
    """A function from a position (x, y) in an image of a panel to the figure's color there, RGB."""
    drawn = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(float)
    titled = [axes for part in figure.subfigs for axes in part.axes if axes.get_title(loc="left")]

    def at(x, y):
        column, row = titled[panel].transData.transform((x, y))
        return drawn[drawn.shape[0] - 1 - int(row), int(column)]

    return at


def share_near(at, color, points):
    """How many of the points have a pixel of this color at most a pixel of the image away."""
    near = [(dx, dy) for dx in (-0.2, -0.1, 0, 0.1, 0.2) for dy in (-0.2, -0.1, 0, 0.1, 0.2)]
    target = np.array(to_rgb(color)) * 255
    seen = [any(np.abs(at(x + dx, y + dy) - target).max() < 12 for dx, dy in near) for x, y in points]
    return np.mean(seen)


def test_boxes_heat_maps_and_legend_are_where_they_belong():
    picture, values = make_picture(), torch.zeros(8, 8)
    values[2, 5], values[7] = 1.0, 1.0  # the last row is padding
    marks = [Mark([8, 6, 30, 40], SKY, "cat"), Mark([35, 10, 60, 30], YELLOW, dashed=True)]
    rows = [
        Row([picture.boxes("boxes", marks)], legend=[LegendEntry("y", SKY)]),
        Row([picture.ground_truth(), picture.heat("heat", values, PADDED)], ColorScale("x", 1.0)),
    ]
    figure = sheet.compose(rows, ["header $1", "line"])
    at = pixels_of(figure, 0)
    sides = [[(8, y) for y in range(8, 38)], [(x, 40) for x in range(10, 28)]]
    assert all(share_near(at, SKY, side) == 1.0 for side in sides)
    assert 0.4 < share_near(at, YELLOW, [(60, y / 4) for y in range(44, 116)]) < 0.95
    inside = [(x, y) for x in range(12, 28, 4) for y in range(16, 36, 4)]
    assert all((np.abs(at(*point) - GRAY) < 3).all() for point in inside)
    at = pixels_of(figure, 2)
    colors = (np.array(colormaps["inferno"](value)[:3]) * 255 for value in (1.0, 0.0))
    hot, cold = (color * sheet.HEAT + (1 - sheet.HEAT) * GRAY for color in colors)
    for y in range(4, 48, 8):
        for x in range(4, 64, 8):
            expected = hot if (x, y) == (44, 20) else cold
            assert np.abs(at(x, y) - expected).max() < 6, (x, y)
    width, height = figure.get_size_inches()
    assert width > 2 * 6.4 and height > 2 * 4.8  # panels of a readable size
    legend = figure.subfigs[0].legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["y"]


# Distances on levels.


def test_one_scale_for_all_levels():
    errors = {name: torch.zeros(1, 2, 8, 8) for name in ("p3", "p4")}
    errors["p3"][0, :, 1, 2] = 1.0
    errors["p4"][0, :, 4, 4] = torch.tensor([0.0, 16.0])  # the mean over channels counts
    errors["p4"][0, :, 7, 7] = 1000.0  # in the padding
    batch = Batch([{"image": torch.zeros(3, 48, 64)}], PADDED, 0, 10)
    row = error_maps.error_row(errors, batch, make_picture(), "distance")
    assert row.scale == ColorScale("distance", 8.0)
    titles = ["ground truth (0)", "p3: mean 0.0208", "p4: mean 0.167"]
    assert [panel.title for panel in row.panels] == titles
    assert row.panels[2].heat[4, 4] == 8.0 and row.panels[2].padded_size == PADDED
    # The last cells are visible in part.
    assert make_picture().visible(torch.zeros(3, 3), (72, 72)).shape == (2, 3)


def random_maps(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"p3": (1, 4, 8, 8), "p4": (1, 4, 4, 4)}
    maps = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return SimpleNamespace(level=lambda name, contiguous=True: maps[name])


def spy_errors(monkeypatch, module):
    """What a method gives to ``error_row``."""
    seen = []
    monkeypatch.setattr(module, "error_row", lambda errors, *_: seen.append(errors) or Row([]))
    return seen


FORMS = [
    (form, normalize) for form in ("L2", "L1", "smoothL1") for normalize in ("none", "channel", "level")
]
LEVELS = {"in_features": ["p3", "p4"]}


@pytest.mark.parametrize(
    "module, loss",
    [(mimic, FeatureMimic(**LEVELS, loss_form=form, normalize=n)) for form, n in FORMS]
    + [(pkd, PKD(**LEVELS))],
)
def test_terms_of_the_loss_are_drawn(monkeypatch, module, loss):
    """FeatureMimic's is the mean over both levels, PKD's the sum of halves."""
    views, seen = (random_maps(0), random_maps(1)), spy_errors(monkeypatch, module)
    draw = module.mimic if module is mimic else module.pkd
    draw(loss, *views, None, None)
    drawn = torch.stack([error.mean() / 2 for error in seen[0].values()]).sum()
    (term,) = loss(*views, None).values()
    torch.testing.assert_close(drawn, term)


@pytest.mark.parametrize("method", ["defeat", "fgfi"])
def test_masks_and_distances_are_the_terms_of_the_loss(make_job, monkeypatch, method):
    """In a step of a Distiller."""
    job = make_job(method, "MODEL.DISTILLER.DEFEAT.LOSS_FORM", "L1")
    errors, terms = spy_errors(monkeypatch, regions), []
    loss = job.distiller.losses[METHODS[method]]
    loss.register_forward_hook(lambda _m, _i, output: terms.append(output))
    row, _ = tool.draw(job, job.items["0"])
    masks = [panel.heat for panel in row.panels[1:]]
    assert list(errors[0]) == ["p2", "p3", "p4"] and len(masks) == 3
    assert 0 < sum(mask.sum() for mask in masks) < sum(mask.numel() for mask in masks)
    means = [
        (mask * error[0].mean(dim=0)).sum() / (2 * mask.sum()).clamp(min=1 / error.shape[1])
        for mask, error in zip(masks, errors[0].values())
    ]
    name, weight = {"defeat": ("loss_defeat_neck", 3.0), "fgfi": ("loss_fgfi", 1.0)}[method]
    torch.testing.assert_close(weight * torch.stack(means).mean(), terms[0][name])


# GID.


def test_instances_are_drawn_by_kind_with_their_scores():
    boxes = [[4, 4, 24, 20], [30, 4, 60, 20], [4, 25, 24, 44], [30, 26, 44, 44], [50, 30, 62, 46]]
    selected = GeneralInstances(
        boxes=torch.tensor([boxes], dtype=torch.float32),
        scores=torch.tensor([[0.834, 0.71, 0.5, 0.25, 0.9]]),
        rows=torch.zeros(1, 5, dtype=torch.int64),
        from_teacher=torch.tensor([[True, False, True, True, True]]),
        valid=torch.tensor([[True, True, True, True, False]]),
    )
    kinds = {name: torch.arange(5)[None] == slot for slot, name in enumerate(["pos", "semi_pos", "neg"])}
    row = selection_row(selected, kinds, "all", make_picture())
    colors = [SKY, YELLOW, VERMILION, WHITE]
    scores = ["0.83", "0.71", "0.50", "0.25"]
    expected = [Mark(boxes[i], colors[i], scores[i], dashed=i == 1) for i in range(4)]
    assert row.panels[1].marks == expected
    assert row.panels[1].title.startswith("4 general instances")
    labels = ["positive (1)", "semi-positive (1)", "negative (1)", "none of them (1)"]
    assert [(entry.label, entry.color) for entry in row.legend[:4]] == list(zip(labels, colors))
    assert row.legend[4].dashed


@pytest.mark.parametrize("family", ["retinanet", "faster"])
def test_the_instances_of_the_loss_are_drawn(make_job, write_config, monkeypatch, family):
    config_file = write_config(family)
    job = make_job("gid", "MODEL.DISTILLER.GID.GI_MODE", "gt", config_file=config_file)
    [row] = tool.draw(job, job.items["0"])
    assert row.panels[0].title == "instances are the ground truth, GI_MODE gt (2)"
    job = make_job("gid", "MODEL.DISTILLER.GID.GI_MIN_SIDE", "4.0", config_file=config_file)
    loss, seen = job.distiller.losses["GID"], []
    select = loss.instances
    monkeypatch.setattr(loss, "instances", lambda *args: seen.append(select(*args)) or seen[-1])
    [row] = tool.draw(job, job.items["0"])
    shown, used = seen  # by the picture, and by the loss
    assert all(torch.equal(value, vars(shown)[name]) for name, value in vars(used).items())
    boxes = shown.boxes[0][shown.valid[0]].tolist()
    assert len(boxes) >= 2 and [mark.box for mark in row.panels[1].marks] == boxes


# ICD.


def make_item(boxes, classes):
    picture = make_picture(boxes=boxes, classes=classes)
    return {"image": torch.from_numpy(picture.image).permute(2, 0, 1), "instances": picture.instances}


@pytest.mark.parametrize("level", [0, 1])
def test_attention_peaks_where_it_was_planted(make_job, monkeypatch, level):
    """The decoder's last layer looks for instance n at the n-th of these cells of one level."""
    job, cells = make_job("icd", *ICD_OPTIONS), [(1, 2), (3, 6)]
    loss = job.distiller.losses[ICD]

    def decode(maps, queries, geometry, _iteration):
        sizes = [height * width for height, width in geometry.level_sizes]
        columns = geometry.level_sizes[level][1]
        positions = [sum(sizes[:level]) + row * columns + column for row, column in cells]
        values = torch.full((2, len(cells), sum(sizes)), -20.0)
        values[:, range(len(cells)), positions] = 20.0
        return [None, SimpleNamespace(logits=lambda _image, slots, _temperature: values[:, slots])]

    monkeypatch.setattr(loss, "decode", decode)
    monkeypatch.setattr(loss, "forward", lambda *_: {})  # the loss itself cannot go on with it
    rows = tool.draw(job, make_item([[2, 2, 10, 12], [30, 4, 60, 40]], [0, 1]))
    assert len(rows) == 2
    for row, cell in zip(rows, cells[::-1]):  # the largest first
        assert [panel.title.split(":")[0] for panel in row.panels[1:]] == ["p2", "p3", "p4"]
        panel = row.panels[1 + level]
        assert panel.title.endswith(" 100% of the attention")
        assert panel.heat[cell] == pytest.approx(1.0)


def test_a_row_for_each_of_the_largest_instances(make_job):
    job = make_job("icd", *ICD_OPTIONS)
    boxes = [[4, 4, 10 + 4 * index, 12 + 4 * index] for index in range(7)]
    item = make_item(boxes, [0, 1, 2, 0, 1, 2, 0])
    rows = tool.draw(job, item)
    expected = ["class0", "class2", "class1", "class0", "class2"]
    titles = [f"{name}, {rank} of 7 by size" for rank, name in enumerate(expected, start=1)]
    assert [row.panels[0].title for row in rows] == titles
    for row, box in zip(rows, boxes[::-1]):
        marks = [row.panels[0].marks[0], row.panels[1].marks[0]]
        assert all(mark.color == SKY and mark.box == pytest.approx(box, abs=1e-4) for mark in marks)
        assert len(row.panels[0].marks) == 7
        shares = [float(panel.title.split()[1].rstrip("%")) for panel in row.panels[1:]]
        assert sum(shares) == pytest.approx(100, abs=2)
    [row] = tool.draw(job, {**item, "instances": item["instances"][:0]})
    assert [panel.title for panel in row.panels] == ["ground truth (0)"]
