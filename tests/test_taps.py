"""Taps: recording the outputs of named modules, and ending a forward early."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from distill_d2.taps import Taps, find_module


class Net(nn.Module):
    """A shared head, called once per level, with several kinds of outputs."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        self.head = nn.Linear(3, 1)
        self.split = Split()

    def forward(self, x):
        x = self.stem(x)
        return self.head(x), self.head(2 * x), self.split(x)


class Split(nn.Module):
    def forward(self, x):
        return {"p2": x, "rest": (x + 1, [x + 2, "a name"])}


X = torch.ones(1, 2)


@pytest.fixture
def taps():
    taps = Taps(Net())
    with taps.recording():
        yield taps


def hooks_of(model):
    return [hook for module in model.modules() for hook in module._forward_hooks.values()]


def test_outputs_are_the_live_ones(taps):
    taps.add("stem.0")
    taps.add("split")
    *_, split = taps.model(X)
    assert torch.equal(taps.output("stem.0"), taps.model.stem[0](X))
    assert taps.output("split") is split  # a nest of dicts, tuples and lists


@pytest.mark.parametrize(
    "path, close", [("stm.0", r"\['stem.0'"), ("stem." + 24 * "q", r"\['stem.0', 'stem.1'\]")]
)
def test_unknown_name_lists_close_ones_or_siblings(taps, path, close):
    with pytest.raises(KeyError, match=rf"Net has no module '{path}'; the closest names are {close}"):
        taps.add(path)
    assert find_module(taps.model, "") is taps.model


def test_one_call_is_its_output_and_several_are_a_list(taps):
    for path in ("stem", "head", "stem"):  # adding a module twice changes nothing
        taps.add(path)
    one, two, _ = taps.model(X)
    assert isinstance(taps.output("stem"), torch.Tensor)
    outputs = taps.output("head")
    assert isinstance(outputs, list) and outputs[0] is one and outputs[1] is two


@pytest.mark.parametrize("error", [None, ValueError])
def test_hooks_and_outputs_are_there_while_recording_only(error):
    taps = Taps(Net())
    taps.add("stem")
    try:
        with taps.recording():
            taps.model(X)
            assert taps.has("stem") and len(hooks_of(taps.model)) == 1
            if error:
                raise error
    except ValueError:
        pass
    taps.model(X)
    assert not taps.has("stem") and not hooks_of(taps.model)
    with pytest.raises(RuntimeError, match="'stem' did not run in this step"):
        taps.output("stem")


@pytest.mark.parametrize("started", [False, True])
def test_a_copy_records_its_own_model(started):
    taps = Taps(Net())
    taps.add("stem")
    if started:
        taps.start()
    for copied in (copy.deepcopy(taps), pickle.loads(pickle.dumps(taps))):
        assert copied.model is not taps.model
        copied.start()
        copied.model(X)
        assert copied.has("stem") and not taps.has("stem")
    taps.start()
    taps.model(2 * X)
    assert not torch.equal(taps.output("stem"), copied.output("stem"))


def test_the_model_is_pickled_and_scripted_without_taps():
    taps = Taps(nn.Sequential(nn.Linear(2, 3)))
    taps.add("0")
    with taps.recording():
        taps.model(X)
    file = io.BytesIO()
    torch.save(taps.model, file)
    assert b"distill_d2" not in file.getvalue()
    assert torch.jit.script(taps.model)(X).shape == (1, 3)


@pytest.mark.parametrize("change", ["top", "nested"])
def test_change_in_place_is_an_error(taps, change):
    path = {"top": "stem.0", "nested": "split"}[change]
    taps.add(path)
    with torch.no_grad():
        taps.model(X)
        output = taps.output(path)
        (output if change == "top" else output["rest"][1][0]).relu_()
    with pytest.raises(RuntimeError, match=f"'{path}' was changed in place.*tap the enclosing module"):
        taps.output(path)


# Ending a forward early.


class Chain(nn.Module):
    """Layers "a" to "d", one after the other, inside "body"; which of them ran."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential()
        self.ran = []
        for name in "abcd":
            layer = nn.Linear(1, 1)
            layer.register_forward_pre_hook(lambda *_, name=name: self.ran.append(name))
            self.body.add_module(name, layer)

    def forward(self, x):
        output = self.body(x)
        self.ran.append("end")
        return output


@pytest.fixture
def chain():
    """Taps on the layers of a Chain and on all of them together; recording."""
    taps = Taps(Chain())
    for path in ("body.a", "body.b", "body.c", "body.d", "body"):
        taps.add(path)
    with taps.recording():
        yield taps


def stopped(taps, paths, last="body"):
    """Which layers run until ``paths`` have."""
    taps.model.ran.clear()
    with taps.stopping_after(paths, last):
        taps.model(torch.ones(1, 1))
    return "".join(taps.model.ran)


@pytest.mark.parametrize("paths, ran", [("a", "a"), ("bc", "abc"), ("cb", "abc"), ("d", "abcd")])
def test_forward_ends_after_the_last_that_is_read(chain, paths, ran):
    assert stopped(chain, [f"body.{path}" for path in paths]) == ran
    assert chain.recorded == [f"body.{name}" for name in ran]
    x = torch.ones(1, 1)
    for name in ran:
        x = chain.model.body.get_submodule(name).forward(x)
        assert torch.equal(chain.output(f"body.{name}"), x)
    chain.output(f"body.{ran[-1]}").sum().backward()
    assert "".join(n for n, m in chain.model.body.named_children() if m.weight.grad is not None) == ran
    chain.release()
    assert stopped(chain, ["body.a"]) == "abcdend"  # where nothing is recorded


@pytest.mark.parametrize(
    "paths, last, ran",
    [
        (["other", "body.a"], "body.c", "abc"),  # "other" does not run
        (["other", "body.a"], "body", "abcd"),
        (["body", "body.a"], "body", "abcd"),
        ([], "body", "abcdend"),
    ],
)
def test_forward_ends_at_the_last(chain, paths, last, ran):
    chain.model.other = nn.Linear(1, 1)
    chain.add("other")
    assert stopped(chain, paths, last) == ran


def test_a_model_that_catches_exceptions_ends_too(chain):
    class Careful(nn.Module):
        def forward(self, x):
            try:
                return chain.model(x)
            except Exception:
                return self(x)

    model = Careful()
    with chain.stopping_after(["body.a"], "body"):
        model(torch.ones(1, 1))
    assert chain.model.ran == ["a"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_errors_of_the_model_are_raised(chain, error):
    def fail(*_):
        raise error("in the model")

    handle = chain.model.body.b.register_forward_pre_hook(fail)
    with pytest.raises(error, match="in the model"):
        stopped(chain, ["body.c"])
    handle.remove()
    chain.model.ran.clear()
    chain.model(torch.ones(1, 1))  # nothing is awaited any more
    assert "".join(chain.model.ran) == "abcdend"
