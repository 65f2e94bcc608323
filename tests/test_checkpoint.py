"""Checkpoints: read without running their code, written so that none is lost."""

import errno
import io
import json
import os
import pickle
import re
import resource
import zipfile
from urllib.error import URLError

import numpy as np
import pytest
import torch
from detectron2.modeling.backbone.resnet import BasicStem
from detectron2.utils.file_io import PathManager
from runs import assert_equal
from torch import nn

from distill_d2.checkpoint import SafeCheckpointer, direct_address, read_checkpoint, told_when_full
from distill_d2.checkpoint.reading import read_pickle

WEIGHT = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]


class Evil:
    """Unpickling it creates a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def linear():
    model = nn.Linear(3, 2)
    nn.init.zeros_(model.weight)
    return model


def arrays():
    return {"weight": np.array(WEIGHT, np.float32), "bias": np.array([7.0, 8.0], np.float32)}


def write(path, data, protocol=2):
    path.write_bytes(pickle.dumps(data, protocol))
    return str(path)


def load(model, path):
    checkpointer = SafeCheckpointer(model)
    rest = checkpointer.load(str(path))
    return rest, checkpointer.incompatible


# Addresses.

FILE = "https://huggingface.co/tianzhi/AdelaiDet-FCOS/resolve/main/FCOS_R_50_1x.pth"


@pytest.mark.parametrize(
    "path, expected",
    [
        (FILE, FILE),
        (FILE.replace("resolve", "blob") + "?download=true", FILE),
        ("https://hf.co/a/b/resolve/main/c.pth?download=1", "https://hf.co/a/b/resolve/main/c.pth"),
        (f"{FILE}?download=true&matching_heuristics=True", f"{FILE}?matching_heuristics=True"),
        ("https://elsewhere.org/blob/a.pth?download=true",) * 2,
        ("detectron2://ImageNetPretrained/MSRA/R-50.pkl",) * 2,
        ("a/blob/b.pth",) * 2,
    ],
)
def test_addresses_of_files(path, expected):
    assert direct_address(path) == expected


def test_a_page_of_a_file_is_the_file(tmp_path, monkeypatch):
    downloads, path = [], str(tmp_path / "downloaded.pth")
    torch.save({"model": {"weight": torch.tensor(WEIGHT), "bias": torch.zeros(2)}}, path)
    monkeypatch.setattr(PathManager, "get_local_path", lambda url, **_: downloads.append(url) or path)
    model, address = linear(), FILE.replace("resolve", "blob") + "?download=true"
    load(model, address)
    assert model.weight.tolist() == WEIGHT
    assert read_checkpoint(address)["model"]["weight"].tolist() == WEIGHT
    SafeCheckpointer(linear()).resume_or_load(address, resume=False)
    assert set(downloads) == {FILE}


# Reading.


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_detectron2s_zoo_format(tmp_path, protocol):
    model = linear()
    data = {"model": arrays(), "__author__": "us", "iteration": 3, "ap": np.float64(0.5)}
    rest, keys = load(model, write(tmp_path / "zoo.pkl", data, protocol))
    assert model.weight.tolist() == WEIGHT and model.bias.tolist() == [7.0, 8.0]
    assert rest == {"__author__": "us", "iteration": 3, "ap": 0.5}
    assert not keys.missing_keys and not keys.unexpected_keys


@pytest.mark.parametrize("author", ["numpy.core", "numpy._core"])
def test_pickles_of_numpy_1_and_2(tmp_path, author):
    blob = pickle.dumps({"model": arrays(), "__author__": "us"}, 2)
    for own in (b"numpy._core.", b"numpy.core."):
        blob = blob.replace(own, b"NUMPY.")
    assert b"NUMPY.multiarray" in blob
    path = tmp_path / "zoo.pkl"
    path.write_bytes(blob.replace(b"NUMPY.", author.encode() + b"."))
    model = linear()
    load(model, path)
    assert model.weight.tolist() == WEIGHT


def test_pickle_of_python_2(tmp_path):
    # A byte string of Python 2 with a byte that is not ASCII.
    text = b"(dp0\nS'__author__'\np1\nS'\\xe9'\np2\nsS'model'\np3\n(dp4\nS'bias'\np5\nF1.0\nss."
    path = tmp_path / "zoo.pkl"
    path.write_bytes(text)
    assert read_pickle(str(path)) == {"__author__": "\xe9", "model": {"bias": 1.0}}


@pytest.mark.parametrize("caffe2", [False, True])
def test_names_of_detectron_1_and_caffe2(tmp_path, caffe2):
    data = {
        "conv1_w": np.full((4, 3, 7, 7), 2, np.float32),
        "res_conv1_bn_s": np.full(4, 3, np.float32),
        "res_conv1_bn_b": np.full(4, 4, np.float32),
        "conv1_w_momentum": np.zeros((4, 3, 7, 7), np.float32),
    }
    stem = nn.ModuleDict({"stem": BasicStem(3, 4, norm="FrozenBN")})
    data = data if caffe2 else {"blobs": data, "cfg": "text"}
    _, keys = load(stem, write(tmp_path / "R-50.pkl", data))
    conv = stem["stem"].conv1
    assert (conv.weight == 2).all() and (conv.norm.weight == 3).all() and (conv.norm.bias == 4).all()
    assert not keys.unexpected_keys


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name, entry", [("model.pth", "model"), ("pycls.pyth", "model_state")])
def test_torch_files(tmp_path, legacy, name, entry):
    source, model, path = nn.Linear(3, 2), linear(), tmp_path / name
    data = {entry: source.state_dict(), "iteration": 4}
    torch.save(data, path, _use_new_zipfile_serialization=not legacy)
    rest, _ = load(model, path)
    assert torch.equal(model.weight, source.weight) and (entry != "model" or rest == {"iteration": 4})


def test_incompatible_keys_are_kept(tmp_path):
    torch.save({"weight": torch.zeros(5, 3), "more": torch.zeros(1)}, tmp_path / "model.pth")
    _, keys = load(linear(), tmp_path / "model.pth")
    assert keys.unexpected_keys == ["more"] and "bias" in keys.missing_keys
    assert keys.incorrect_shapes == [("weight", (5, 3), (2, 3))]


def test_query_for_matching_by_name(tmp_path):
    torch.save({"conv.weight": torch.full((2, 3), 5.0)}, tmp_path / "model.pth")
    model = nn.ModuleDict({"backbone": nn.ModuleDict({"conv": linear()})})
    load(model, f"{tmp_path / 'model.pth'}?matching_heuristics=True")
    assert (model["backbone"]["conv"].weight == 5).all()


# Refusing.


@pytest.mark.parametrize("protocol", [0, 4])
@pytest.mark.parametrize("place", ["top", "inside", "in an array"])
def test_pkl_that_runs_code(tmp_path, protocol, place):
    marker = tmp_path / "executed"
    evil = Evil(marker)
    inside = np.array([evil], dtype=object) if place == "in an array" else evil
    data = evil if place == "top" else {"model": {**arrays(), "x": inside}, "__author__": "us"}
    path = write(tmp_path / "evil.pkl", data, protocol)
    with pytest.raises(
        ValueError,
        match=r"evil.pkl'.*it (uses posix.system; only numpy arrays|holds an array of object)",
    ):
        load(linear(), path)
    assert not marker.exists()
    pickle.loads((tmp_path / "evil.pkl").read_bytes())
    assert marker.exists()  # the test can fail: an ordinary unpickler does run it


NUMPYS = ("numpy.load", "numpy._core.multiarray.fromfile", "numpy.core.os")


@pytest.mark.parametrize("name", ["builtins.eval", "builtins.getattr", *NUMPYS])
def test_globals_that_are_refused(tmp_path, name):
    owner, _, attribute = name.rpartition(".")
    path = tmp_path / "evil.pkl"
    path.write_bytes(f"c{owner}\n{attribute}\n.".encode())
    with pytest.raises(ValueError, match=f"it uses {name}"):
        load(linear(), path)


@pytest.mark.parametrize("suffix", [".pth", ".pyth"])
@pytest.mark.parametrize("legacy", [False, True])
def test_torch_file_that_runs_code(tmp_path, suffix, legacy):
    marker, path = tmp_path / "executed", tmp_path / f"evil{suffix}"
    torch.save({"model": Evil(marker)}, path, _use_new_zipfile_serialization=not legacy)
    message = f"cannot read the checkpoint '{path}': it uses posix.system"
    with pytest.raises(ValueError, match=message) as error:
        load(linear(), path)
    assert not marker.exists()
    assert len(str(error.value).splitlines()) == 1  # without torch's advice to trust the file


@pytest.mark.parametrize("kind", ["pkl", "pth", "large pth", "legacy pth"])
def test_truncated(tmp_path, kind):
    path = tmp_path / f"model.{kind[-3:]}"
    if kind == "pkl":
        write(path, {"model": arrays(), "__author__": "us"})
    else:
        data = {"model": nn.Linear(200 if kind == "large pth" else 3, 100).state_dict()}
        torch.save(data, path, _use_new_zipfile_serialization=kind != "legacy pth")
    whole = path.read_bytes()
    for length in {*range(40), *range(0, len(whole), max(len(whole) // 40, 1)), len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(
            ValueError, match=f"cannot read the checkpoint '{path}': it|'{path}': .+It may be truncated"
        ):
            load(linear(), path)


def saved(data, **options):
    file = io.BytesIO()
    torch.save(data, file, **options)
    return file.getvalue()


def packed(content, **options):
    """A zip archive; ``content`` by name."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return file.getvalue()


def scripted():
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(linear(), torch.zeros(1, 3)), file)
    return file.getvalue()


def unpacked(raw):
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


SAFETENSORS = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
HUGE = 10**13
LEGACY = {"_use_new_zipfile_serialization": False}
SAVED, SAVED_LEGACY = saved({"w": torch.zeros(30)}), saved({"w": torch.zeros(30)}, **LEGACY)
CLAIM = b"\x8a\x06" + HUGE.to_bytes(6, "little")
NOT_CHECKPOINTS = {
    "empty.pth": (b"", "it is empty"),
    "page.pth": (b"<!DOCTYPE html><html>Not found</html>", "web page"),
    "page.pkl": (b"\n <html>", "web page"),
    "entries.pth": (b'{"model": 1}', "JSON"),
    "pointer.pth": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "zeros.pth": (bytes(5000), "zeros only"),
    "a.safetensors": (len(SAFETENSORS).to_bytes(8, "little") + SAFETENSORS + bytes(4), "safetensors"),
    "torchscript.pth": (scripted(), "TorchScript"),
    "arrays.pth": (packed({"a.npy": b""}), "npz"),
    "archive.pth": (packed({"a.txt": b""}), "zip archive"),
    "whole_model.pth": (saved(nn.Linear(3, 2)), "whole model save the state_dict"),
    "optimizer.pth": (
        saved({"optimizer": {"state": {}}, "iteration": 3}),
        "no weights of a model.*optimizer",
    ),
    "number.pth": (saved({"model": 3}), "it holds a int, not weights"),
    "tensor.pth": (saved(torch.zeros(3)), "it holds a Tensor, not the entries"),
    "renamed.pkl": (saved({"weight": torch.zeros(1)}), "rename it to .pth"),
    "text.pkl": (b"hello world\n", "truncated"),
    # Made to exhaust the memory or the stack.
    "strides.pth": (
        saved({"weight": torch.zeros(1).expand(HUGE)}),
        f"{HUGE} numbers, but the file has only",
    ),
    "storage.pth": (
        packed({k: v.replace(b"K\x1et", CLAIM + b"t") for k, v in unpacked(SAVED).items()}),
        "size",
    ),
    "storage_legacy.pth": (SAVED_LEGACY.replace(b"K\x1eN", CLAIM + b"N"), "more memory"),
    "bomb.pth": (
        packed(unpacked(saved({"w": torch.zeros(9**6)})), compression=zipfile.ZIP_DEFLATED),
        "bytes unpack to",
    ),
    "array.pkl": (pickle.dumps({"w": Call(np.ndarray, (HUGE,))}), ""),
    "objects.pkl": (pickle.dumps({"w": np.array([None])}), "array of object; only arrays of numbers"),
    "memo.pkl": (b"\x80\x02}r\xff\xff\xff\xff.", "no weights"),
    "bytes.pkl": (b"\x80\x05\x96" + HUGE.to_bytes(8, "little") + b"a.", "more memory"),
    "deep.pkl": (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "it holds a list, not weights"),
    "deep.pth": (
        packed({"a/data.pkl": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."}),
        "",
    ),
}


@pytest.mark.parametrize("name", NOT_CHECKPOINTS)
def test_not_a_checkpoint(tmp_path, name):
    content, words = NOT_CHECKPOINTS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"cannot read the checkpoint '.*{name}': .*{words}") as caught:
        load(linear(), tmp_path / name)
    assert len(str(caught.value).splitlines()) == 1


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="checkpoint '.*none.pth' does not exist"):
        load(linear(), tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        load(linear(), tmp_path)


def test_weights_to_start_from(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"model": {"a.b": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match=rf"MODEL.WEIGHTS .*no tensor of '{path}' fits the Linear"):
        SafeCheckpointer(linear()).resume_or_load(str(path), resume=False)
    with pytest.raises(FileNotFoundError, match="MODEL.WEIGHTS .*'none.pth' does not exist"):
        SafeCheckpointer(linear()).resume_or_load("none.pth", resume=False)


def test_no_flipped_byte_is_loaded(tmp_path):
    """Of a small checkpoint each seventh byte: the file is refused, or the byte does not matter."""
    path, state = tmp_path / "model.pth", linear().state_dict()
    raw = saved({"model": state})
    harmless = 0
    for place in range(0, len(raw), 7):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 0x10]) + raw[place + 1 :])
        try:
            entries = read_checkpoint(str(path))
        except ValueError:
            continue
        harmless += 1
        assert_equal(entries["model"], state)
    assert harmless < len(raw) / 7 / 2  # padding, and copies of the directory's entries


@pytest.mark.parametrize(
    "place, value",
    [(38, 0x10), (6, 0x40), (10, 8)],
    ids=["marked as a folder", "of a later version", "marked as packed"],
)
def test_no_damaged_entry_of_the_directory_is_loaded(tmp_path, place, value):
    """torch leaves the memory of a record undefined that is marked as a folder."""
    path, raw = tmp_path / "model.pth", saved({"model": linear().state_dict()})
    for entry in re.finditer(b"PK\x01\x02", raw):
        byte = entry.start() + place
        path.write_bytes(raw[:byte] + bytes([raw[byte] ^ value]) + raw[byte + 1 :])
        with pytest.raises(ValueError, match="cannot read the checkpoint"):
            read_checkpoint(str(path))


def test_files_without_checksums_are_read(tmp_path):
    if not hasattr(torch.serialization, "set_crc32_options"):
        pytest.skip("this torch always writes checksums")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"weight": torch.tensor(WEIGHT)}, tmp_path / "model.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    model = linear()
    load(model, tmp_path / "model.pth")
    assert model.weight.tolist() == WEIGHT


# Writing.


def test_save_and_load(tmp_path):
    model, optimizer = nn.Linear(3, 2), torch.optim.SGD(linear().parameters(), lr=0.5)
    SafeCheckpointer(model, str(tmp_path), optimizer=optimizer).save("model_1", iteration=1)
    SafeCheckpointer(model, str(tmp_path), save_to_disk=False).save("model_2")  # of another process
    SafeCheckpointer(model, "").save("model_3")
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_1.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_1.pth"

    other, fresh = linear(), torch.optim.SGD(linear().parameters(), lr=0.1)
    rest = SafeCheckpointer(other, str(tmp_path), optimizer=fresh).resume_or_load("", resume=True)
    assert torch.equal(other.weight, model.weight) and rest == {"iteration": 1}
    assert fresh.param_groups[0]["lr"] == 0.5


class Trainer(nn.Module):
    """A trainer's state: an iteration."""

    def __init__(self, iteration):
        super().__init__()
        self.iteration = iteration

    def state_dict(self):
        return {"iteration": self.iteration}

    def load_state_dict(self, state):
        self.iteration = state["iteration"]


NEWEST, WHOLE, OLDER = "model_0000005.pth", "model_0000003.pth", "model_0000001.pth"


@pytest.fixture
def run(tmp_path):
    """A folder with three checkpoints."""
    for iteration in (1, 3, 5):
        model = nn.Linear(300, 100)
        SafeCheckpointer(model, str(tmp_path), trainer=Trainer(iteration)).save(f"model_{iteration:07d}")
    return tmp_path


def resumed(folder, trainer=None):
    """The iteration from which --resume continues."""
    trainer = trainer or Trainer(-1)
    SafeCheckpointer(nn.Linear(300, 100), str(folder), trainer=trainer).resume_or_load("", resume=True)
    return trainer.iteration


def zeroed(raw):
    middle = len(raw) // 2
    return raw[:middle] + bytes(4096) + raw[middle + 4096 :]


DAMAGES = {
    "cut": (lambda raw: raw[:500], "its end is missing"),
    "emptied": (lambda raw: b"", "it is empty"),
    "all zeros": (lambda raw: bytes(len(raw)), "zeros only"),
    "a page of zeros": (zeroed, "checksum"),
    "the end in zeros": (lambda raw: raw[:-4096] + bytes(4096), "its end is missing"),
    "a flipped bit": (lambda raw: raw[:70_000] + bytes([raw[70_000] ^ 1]) + raw[70_001:], "checksum"),
    "another file": (lambda raw: b"<html>", "web page"),
    "weights alone": (
        lambda raw: saved({"model": linear().state_dict()}),
        "without the state of a training",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_resume_takes_the_newest_whole_checkpoint(run, caplog, damage):
    change, words = DAMAGES[damage]
    for name, expected in ((NEWEST, 3), (WHOLE, 1), (OLDER, None)):
        (run / name).write_bytes(change((run / name).read_bytes()))
        if expected is None:
            with pytest.raises(
                ValueError, match=f"no checkpoint in .*{NEWEST}.*{words}.*another OUTPUT_DIR"
            ):
                resumed(run)
        else:
            assert resumed(run) == expected
    assert re.search(
        f"--resume: .*{WHOLE} .iteration 3. is the newest whole .*{NEWEST}': .*{words}", caplog.text
    )


@pytest.mark.parametrize(
    "tag, words",
    [
        (None, "is missing"),
        (b"", "is empty"),
        (b"\x00\xff\x00", "does not hold the name of a file"),
        (b"../elsewhere.pth", "does not hold the name of a file"),
        (b"x" * 100_000, "does not hold the name of a file"),
        (b"model_9999999.pth", "which does not exist"),
    ],
)
def test_last_checkpoint_is_only_a_hint(run, caplog, tag, words):
    (run / "last_checkpoint").unlink()
    if tag is not None:
        (run / "last_checkpoint").write_bytes(tag)
    assert resumed(run) == 5
    assert re.search(f"--resume: .*{NEWEST} .*last_checkpoint .*{words}", caplog.text)


def test_last_checkpoint_names_an_older_one(run):
    """A user may go back with it; a kill between the two files leaves it behind."""
    (run / "last_checkpoint").write_text(OLDER)
    assert resumed(run) == 1
    os.utime(run / "last_checkpoint", (1, 1))
    assert resumed(run) == 5


def test_nothing_to_resume(tmp_path):
    assert resumed(tmp_path / "none") == -1
    (tmp_path / "model_of_others.pth").write_bytes(saved({"model": linear().state_dict()}))
    assert resumed(tmp_path) == -1


def test_a_full_disk_leaves_the_older_checkpoint(run):
    trainer = SafeCheckpointer(nn.Linear(300, 100), str(run), trainer=Trainer(7))
    before, old = sorted(os.listdir(run)), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, old[1]))
    try:
        with pytest.raises(
            OSError,
            match=r"cannot write '.*model_7.pth': File too large; it needs 12\d{4} bytes, \d+ are free",
        ):
            trainer.save("model_7")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert sorted(os.listdir(run)) == before and resumed(run) == 5


@pytest.mark.parametrize("name", [None, "results.json"])
def test_a_full_disk_is_told_wherever_it_is_met(tmp_path, name):
    with pytest.raises(
        OSError, match=rf"cannot write .*{name or 'a file in'}.*: No space left.*, \d+ are free"
    ):
        with told_when_full(str(tmp_path)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)


@pytest.mark.parametrize("name", ["model_1", "model_2"])
def test_failure_while_writing_loses_nothing(tmp_path, monkeypatch, name):
    model = linear()
    checkpointer = SafeCheckpointer(model, str(tmp_path))
    checkpointer.save("model_1", iteration=1)

    def disk_full(_data, file):
        file.write(b"half a checkpoint")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    nn.init.ones_(model.weight)
    with pytest.raises(OSError, match="No space left"):
        checkpointer.save(name, iteration=2)

    assert (tmp_path / "last_checkpoint").read_text() == "model_1.pth"
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_1.pth"]
    other = nn.Linear(3, 2)
    rest = SafeCheckpointer(other, str(tmp_path)).resume_or_load("", resume=True)
    assert rest == {"iteration": 1} and (other.weight == 0).all()


def test_failure_while_writing_the_name_loses_nothing(tmp_path, monkeypatch):
    checkpointer = SafeCheckpointer(linear(), str(tmp_path))
    checkpointer.save("model_1")
    monkeypatch.setattr(os, "fsync", lambda _: pytest.fail("the power fails"))
    with pytest.raises(pytest.fail.Exception):
        checkpointer.tag_last_checkpoint("model_2.pth")
    assert (tmp_path / "last_checkpoint").read_text() == "model_1.pth"


def test_address_of_an_unknown_kind():
    with pytest.raises(FileNotFoundError, match="'s3://a/b.pth' cannot be downloaded"):
        read_checkpoint("s3://a/b.pth")


@pytest.mark.parametrize("scheme", ["https://example.com/", "detectron2://"])
def test_a_download_that_fails_names_the_address(tmp_path, monkeypatch, scheme):
    def get(*_args, **_options):
        raise URLError("no network")

    monkeypatch.setattr(PathManager, "get_local_path", get)
    message = (
        f"{scheme}a.pth' could not be downloaded: .*no network.*set MODEL.WEIGHTS, or for a teacher"
    )
    with pytest.raises(ValueError, match=message):
        SafeCheckpointer(nn.Linear(1, 1), str(tmp_path)).load(f"{scheme}a.pth?matching_heuristics=True")
    with pytest.raises(ValueError, match=message):
        read_checkpoint(f"{scheme}a.pth")
