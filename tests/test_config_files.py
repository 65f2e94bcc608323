"""Config files as users have them: tags, _BASE_, EXTRA_CFG, KEY VALUE pairs; broken and hostile ones."""

import time

import pytest
from detectron2 import model_zoo as detectron2_zoo
from test_arithmetic import OF_PANOPTIC_DEEPLAB, OF_RETINANET

from distill_d2.engine import load_config

RETINANET = "COCO-Detection/retinanet_R_101_FPN_3x.yaml"


def written(folder, files):
    """The path of the first of these {name: content}, below ``folder``."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder / next(iter(files)))


# Tags.

EVAL, TUPLE = "!!python/object/apply:eval", "!!python/tuple"


@pytest.mark.parametrize(
    "yaml, key, value",
    [
        (
            f'MODEL: {{ANCHOR_GENERATOR: {{SIZES: {EVAL} ["{OF_RETINANET}"]}}}}',
            "SIZES",
            eval(OF_RETINANET),
        ),
        (
            f'MODEL:\n  ANCHOR_GENERATOR:\n    SIZES: {EVAL}\n    - "{OF_RETINANET}"',
            "SIZES",
            eval(OF_RETINANET),
        ),
        (
            f"INPUT: {{MIN_SIZE_TRAIN: {EVAL} ['{OF_PANOPTIC_DEEPLAB}']}}",
            "MIN",
            eval(OF_PANOPTIC_DEEPLAB),
        ),
        (f"INPUT: {{MIN_SIZE_TRAIN: {TUPLE} [600, 800]}}", "MIN", [600, 800]),
        (f"INPUT:\n  MIN_SIZE_TRAIN: {TUPLE}\n  - 600\n  - 800", "MIN", [600, 800]),
    ],
)
def test_tags_of_detectron2s_files(tmp_path, yaml, key, value):
    cfg = load_config(written(tmp_path, {"mine.yaml": yaml}))
    found = cfg.MODEL.ANCHOR_GENERATOR.SIZES if key == "SIZES" else list(cfg.INPUT.MIN_SIZE_TRAIN)
    assert found == value


def test_detectron2s_own_file_as_base(tmp_path):
    base = detectron2_zoo.get_config_file(RETINANET)
    sizes = load_config(written(tmp_path, {"mine.yaml": f"_BASE_: {base}"})).MODEL.ANCHOR_GENERATOR.SIZES
    assert sizes == eval(OF_RETINANET)


def test_tag_that_could_run_code(tmp_path):
    """A packaged file of that name is proposed."""
    mark = tmp_path / "mark"
    path = written(tmp_path, {"Base-RetinaNet.yaml": f"SEED: !!python/object/apply:os.mkdir ['{mark}']"})
    with pytest.raises(
        ValueError, match=r"line 1: the yaml tag !!python/object/apply:os.mkdir is not read"
    ) as caught:
        load_config(path)
    assert str(caught.value).endswith("can be used instead: Base-RetinaNet.yaml")
    assert not mark.exists()


# _BASE_, EXTRA_CFG and the teacher.


@pytest.mark.parametrize(
    "base, depth",
    [
        ("below/base.yaml", 18),
        (RETINANET, 101),
        ("COCO-PanopticSegmentation/panoptic_fpn_R_101_3x.yaml", 101),  # of detectron2 alone
        (f"[{RETINANET}, below/base.yaml]", 18),
        (f"[below/base.yaml, {RETINANET}]", 101),
    ],
)
@pytest.mark.parametrize("key", ["_BASE_", "EXTRA_CFG"])
def test_files_that_a_file_names(tmp_path, monkeypatch, key, base, depth):
    monkeypatch.chdir("/")
    files = {"mine.yaml": f"{key}: {base}", "below/base.yaml": "MODEL: {RESNETS: {DEPTH: 18}}"}
    path = written(tmp_path, files)
    assert load_config(path).MODEL.RESNETS.DEPTH == depth
    cfg = load_config(path, ["EXTRA_CFG", base.replace("below", f"{tmp_path}/below")])
    assert cfg.MODEL.RESNETS.DEPTH == depth and cfg.EXTRA_CFG == []


@pytest.mark.parametrize("key", ["_BASE_", "EXTRA_CFG"])
def test_files_that_include_themselves(tmp_path, key):
    for files in (
        {"a.yaml": f"{key}: a.yaml"},
        {"a.yaml": f"{key}: b.yaml", "b.yaml": f"{key}: [a.yaml]"},
    ):
        path = written(tmp_path, files)
        chain = " -> ".join([path, *(str(tmp_path / name) for name in list(files)[1:]), path])
        with pytest.raises(ValueError) as caught:
            load_config(path)
        assert str(caught.value) == f"config files include themselves through {key}: {chain}"


def test_files_that_multiply(tmp_path):
    files = {f"{i}.yaml": f"_BASE_: [{i + 1}.yaml, {i + 1}.yaml]" for i in range(9)}
    with pytest.raises(ValueError, match="more than 100 files"):
        load_config(written(tmp_path, {**files, "9.yaml": "SEED: 1"}))


NODE = "MODEL: {DISTILLER: {MODEL_LOAD_OFFICIAL: False, MODEL_DISTILLER_CONFIG: teacher.yaml}}"


@pytest.mark.parametrize("place", ["", "base/", "extra/", "extra/base/"])
def test_teacher_beside_any_file(tmp_path, place):
    files = {
        "mine.yaml": f"_BASE_: base/base.yaml\nEXTRA_CFG: extra/extra.yaml\n{NODE}",
        "base/base.yaml": "SEED: 1",
        "extra/extra.yaml": "_BASE_: base/base.yaml",
        "extra/base/base.yaml": "SEED: 2",
    }
    path = written(tmp_path, files)
    with pytest.raises(FileNotFoundError) as caught:
        load_config(path, need_teacher=True)
    for folder in ("", "/base", "/extra", "/extra/base"):
        assert f"{tmp_path}{folder}," in str(caught.value)
    assert load_config(path).MODEL.DISTILLER.MODEL_DISTILLER_CONFIG == "teacher.yaml"
    teacher = written(tmp_path, {f"{place}teacher.yaml": "SEED: 1"})
    assert load_config(path).MODEL.DISTILLER.MODEL_DISTILLER_CONFIG == teacher


def test_packaged_teacher(tmp_path):
    """By name, for another value of MODEL_LOAD_OFFICIAL."""
    cfg = load_config(written(tmp_path, {"mine.yaml": NODE.replace("teacher.yaml", RETINANET)}))
    assert cfg.MODEL.DISTILLER.MODEL_DISTILLER_CONFIG.endswith(f"/configs/{RETINANET}")


# Broken and hostile files.

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{last}'] * 9)}]\n" for last, name in zip("abcdefgh", "bcdefghi")
)
KEYS_BOMB = BOMB.replace("[x,x,x,x,x,x,x,x,x]", "{x: 1}").replace("[", "{<<: [").replace("]", "]}")


@pytest.mark.parametrize(
    "content, words",
    [
        ("", "is empty"),
        (bytes(range(256)), "line 2: not UTF-8"),
        (b"SEED\0: 1", "zero bytes"),
        ("OUTPUT_DIR: é".encode("latin-1"), "line 1: not UTF-8"),
        ("SEED: 1".encode("utf-16"), "UTF-16; save it as UTF-8"),
        ("SEED: \x01", "not valid yaml"),
        ("- a", "holds a list; expected keys and values"),
        ("a", "holds 'a'; expected keys and values"),
        ("SEED: 1\nMODEL: {}\nSEED: 2", "line 3: the key SEED stands here and in line 1"),
        ("MODEL:\n\tMASK_ON: True", "line 2: .*not with tabs"),
        ("SEED: [1\nMODEL: 2", "line 2: not valid yaml"),
        ("SEED: 1\n---\nSEED: 2", "line 2: .*a second document"),
        (BOMB, "line [0-9]: the aliases .* expand to more than"),
        (KEYS_BOMB, "line [0-9]: the aliases .* expand to more than"),
        ("a: &a [*a]", "line 1: an alias .* that contains itself"),
        ("SEED: " + "[" * 100_000, "line 1: nested in more than"),
        ("- " * 100_000, "line 1: nested in more than"),
        ("OUTPUT_DIR: " + "-" * 100_000 + "1", "nested too deeply|expected at most"),
        ("SEED: 1" + "0" * 30, "more than 64 bits"),
        ("SEED: '1" + "0" * 30 + "'", "more than 64 bits"),
        ("DATASETS: {CUSTOM: [{NAME: 1" + "0" * 30 + "}]}", "DATASETS.CUSTOM has .* more than 64 bits"),
        ("SEED: " + "9" * 900_000, "a number of 900000 characters"),
        ("SEED: " + "1:" * 5_000 + "1", "a number of 10001 characters"),
        ("OUTPUT_DIR: " + "x" * 2_000_000, "2000012 bytes; expected at most"),
        ('OUTPUT_DIR: "\\0"', "a text with a zero byte"),
        ("SEED: !!bool x", "a value does not fit its tag"),
        ("SEED: !!map [1]", "not valid yaml"),
        ("SEED: !mine 3", "the yaml tag !mine is not read"),
        (f"SEED: {EVAL} 3", "needs one text in a list"),
        (f"SEED: {EVAL} ['2**70']", "more than 64 bits"),
        ("MODEL: {1: 2}", "the key 'MODEL.1' is int"),
        ("MODEL: {on: 2}", "the key 'MODEL.True' is bool"),
        ("? [1]\n: 2", "a list or a dict as a key"),
        ("MODEL:", "MODEL is empty .* expected {name: value, ...}"),
        ("SEED:", "SEED is empty .*; expected an integer"),
        ("SEED: one", "SEED is 'one'; expected an integer"),
        ("MODEL: {MASK_ON: 1}", "MODEL.MASK_ON is 1; expected True or False"),
        ("DATASETS: {TRAIN: mine}", r"DATASETS.TRAIN is 'mine'; expected a list, such as \[a, b\]"),
        ("VERSION: 3", "VERSION is 3; expected 1 or 2"),
        ("_BASE_: 3", "_BASE_ is 3; expected a file, or a list of files"),
        ("_BASE_: .", "_BASE_: config '.' is a folder"),
        ("_BASE_: none.yaml", "_BASE_: config 'none.yaml' does not exist; tried: "),
        ("EXTRA_CFG: [3]", "EXTRA_CFG has the entry 3; expected a file"),
        (
            "SOLVER.MAX_ITER: 3",
            r"unknown config key 'SOLVER.MAX_ITER'; in yaml write SOLVER: {MAX_ITER: ...}",
        ),
        (
            "SOLVER: {MAX_ITERS: 3}",
            r"unknown config key 'SOLVER.MAX_ITERS'; the closest are \['SOLVER.MAX_ITER'",
        ),
    ],
)
def test_broken_file(tmp_path, content, words):
    path = written(tmp_path, {"mine.yaml": content})
    start = time.perf_counter()
    with pytest.raises((ValueError, KeyError, FileNotFoundError), match=words) as caught:
        load_config(path)
    message = str(caught.value)
    assert path in message or "EXTRA_CFG" in message
    assert len(message) < 600 and "\n" not in message
    assert time.perf_counter() - start < 5


def test_the_file_of_a_wrong_key_is_named(tmp_path):
    path = written(tmp_path, {"mine.yaml": "_BASE_: base.yaml\nSEED: 1", "base.yaml": "MODEL: {X: 1}"})
    with pytest.raises(KeyError) as caught:
        load_config(path)
    assert f"config file '{tmp_path}/base.yaml' (a _BASE_ of '{path}')" in str(caught.value)


def test_folder_as_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="is a folder .*; expected a file"):
        load_config(str(tmp_path))


@pytest.mark.parametrize(
    "content, value",
    [
        (b"\xef\xbb\xbfOUTPUT_DIR: a\r\n", "a"),
        ("OUTPUT_DIR: 2024-05-01", "2024-05-01"),
        ("OUTPUT_DIR: '2024'", "2024"),
        ("OUTPUT_DIR: ünï", "ünï"),
        ("VERSION: 1\nOUTPUT_DIR: a\nMODEL: {WEIGHT: b}", "a"),
        ("base: &base {OUTPUT_DIR: a}\n<<: *base", KeyError),
    ],
)
def test_unusual_file(tmp_path, content, value):
    path = written(tmp_path, {"mine.yaml": content})
    if value is KeyError:
        with pytest.raises(KeyError, match="unknown config key 'base'"):
            load_config(path)
    else:
        assert load_config(path).OUTPUT_DIR == value


# KEY VALUE pairs.


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("DATASETS.TRAIN", "[a, b]", ("a", "b")),
        ("DATASETS.TRAIN", "('a', 'b')", ("a", "b")),
        ("SOLVER.STEPS", f'{EVAL} ["[2 * 3]"]', (6,)),
        (
            "DATASETS.CUSTOM",
            "[{NAME: n, FORMAT: images, IMAGES: /}]",
            [dict(NAME="n", FORMAT="images", IMAGES="/")],
        ),
        (
            "DATASETS.CUSTOM",
            "[{'NAME': 'n', 'FORMAT': 'images', 'IMAGES': '/'}]",
            [dict(NAME="n", FORMAT="images", IMAGES="/")],
        ),
        ("MODEL.MASK_ON", "true", True),
        ("SOLVER.BASE_LR", "1", 1.0),
        ("OUTPUT_DIR", "2024", "2024"),
        ("SOLVER.WEIGHT_DECAY_BIAS", "None", None),
    ],
)
def test_value_on_the_command_line(key, text, value):
    node = load_config("", [key, text])
    for name in key.split("."):
        node = node[name]
    assert node == value and type(node) is type(value)


def test_pairs_with_an_equals_sign():
    node = load_config("", ["SEED=3", "MODEL.WEIGHTS", "a=b", "OUTPUT_DIR=c=d", "SOLVER.STEPS=[1, 2]"])
    assert (node.SEED, node.MODEL.WEIGHTS, node.OUTPUT_DIR) == (3, "a=b", "c=d")
    assert node.SOLVER.STEPS == (1, 2)


@pytest.mark.parametrize(
    "key, text, words",
    [
        ("SOLVER.STEPS", "[" * 40_000, "SOLVER.STEPS is '.*nested in more than"),
        ("SOLVER.STEPS", "[" * 100_000, "SOLVER.STEPS has a value of 100000 characters"),
        ("MODEL.WEIGHTS", "[" * 40_000, "MODEL.WEIGHTS is a text of 40000 characters"),
        ("SOLVER.STEPS", "-" * 40_000 + "1", "SOLVER.STEPS is '.*nested too deeply|nested"),
        ("SEED", "9" * 30, "SEED has an integer of more than 64 bits"),
        ("SEED", "", "SEED is empty"),
        ("MODEL.WEIGHTS", "None", "MODEL.WEIGHTS is empty .*; expected text"),
        ("EXTRA_CFG", "nowhere.yaml", "EXTRA_CFG: config 'nowhere.yaml' does not exist"),
        ("DATASETS.TRAIN", "mine", r"DATASETS.TRAIN is 'mine'; expected a list.*Write \[mine\]"),
        ("SOLVER.STEPS", "[1, 2", r"SOLVER.STEPS is '\[1, 2'; expected a list"),
        (
            "SOLVER.STEPS",
            "[!!python/name:os.system x]",
            "the yaml tag !!python/name:os.system is not read",
        ),
        ("MODEL", "{1: 2}", "the key 'MODEL.1' is int"),
        ("_BASE_", "x", "unknown config key '_BASE_'"),
        ("x" * 100_000, "1", "unknown config key 'xxx"),
        ("solver.max_iter", "1", r"'solver.max_iter'; the closest are \['SOLVER.MAX_ITER'\]"),
        ("qqqqqqqqqqqq", "1", "unknown config key 'qqqqqqqqqqqq'.?$"),
        (
            "SEED=3",
            "SOLVER.MAX_ITER",
            "incomplete: SEED=3 SOLVER.MAX_ITER; expected a value after the key SO",
        ),
        ("--config-file", "a.yaml", "--config-file stands after a KEY VALUE pair"),
    ],
)
def test_wrong_value_on_the_command_line(key, text, words):
    with pytest.raises((ValueError, KeyError, FileNotFoundError), match=words) as caught:
        load_config("", [key, text])
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)
