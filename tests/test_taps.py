"""Taps: forward hooks that remember the outputs of named modules for one step."""

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


@pytest.fixture
def taps():
    taps = Taps(Net())
    taps.recording = True
    return taps


def test_dotted_name(taps):
    taps.add("stem.0")
    taps.model(torch.ones(1, 2))
    assert torch.equal(taps.output("stem.0"), taps.model.stem[0](torch.ones(1, 2)))


def test_gradients_reach_the_model(taps):
    taps.add("stem.0")
    taps.model(torch.ones(1, 2))
    taps.output("stem.0").sum().backward()
    assert torch.equal(taps.model.stem[0].bias.grad, torch.ones(3))


def test_unknown_name_lists_close_ones(taps):
    with pytest.raises(KeyError, match=r"Net has no module 'stm.0'; the closest names are \['stem.0'"):
        taps.add("stm.0")


def test_unknown_name_without_close_ones_lists_siblings():
    with pytest.raises(KeyError, match=r"\['stem.0', 'stem.1'\]"):
        find_module(Net(), "stem.qqqqqqqqqqqqqqqqqqqqqqqq")


def test_the_model_itself_has_the_empty_name():
    model = Net()
    assert find_module(model, "") is model


def test_one_call_is_its_output_and_several_are_a_list(taps):
    taps.add("head")
    x = torch.ones(1, 2)
    one, two, _ = taps.model(x)
    outputs = taps.output("head")
    assert isinstance(outputs, list)
    assert [outputs[0] is one, outputs[1] is two] == [True, True]


def test_adding_twice_remembers_once(taps):
    taps.add("stem")
    taps.add("stem")
    taps.model(torch.ones(1, 2))
    assert isinstance(taps.output("stem"), torch.Tensor)


def test_nested_output_is_kept_as_it_is(taps):
    taps.add("split")
    *_, split = taps.model(torch.ones(1, 2))
    assert taps.output("split") is split


def test_cleared(taps):
    taps.add("stem")
    taps.model(torch.ones(1, 2))
    assert taps.has("stem")
    taps.clear()
    assert not taps.has("stem")
    with pytest.raises(RuntimeError, match="'stem' did not run in this step"):
        taps.output("stem")


def test_nothing_is_kept_while_not_recording(taps):
    taps.add("stem")
    taps.recording = False
    taps.model(torch.ones(1, 2))
    assert not taps.has("stem")


@pytest.mark.parametrize("change", ["top", "nested"])
def test_change_in_place_is_an_error(taps, change):
    path = {"top": "stem.0", "nested": "split"}[change]
    taps.add(path)
    with torch.no_grad():
        taps.model(torch.ones(1, 2))
        output = taps.output(path)
        (output if change == "top" else output["rest"][1][0]).relu_()
    with pytest.raises(RuntimeError, match=f"'{path}' was changed in place"):
        taps.output(path)


def test_in_place_activation_of_the_model_is_an_error():
    taps = Taps(nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True)))
    taps.add("0")
    taps.add("1")
    taps.recording = True
    taps.model(torch.ones(1, 2))
    assert taps.output("1").shape == (1, 3)
    with pytest.raises(RuntimeError, match="tap the enclosing module"):
        taps.output("0")


def test_remove_takes_the_hooks_off(taps):
    taps.add("stem")
    taps.remove()
    taps.model(torch.ones(1, 2))
    assert not taps.has("stem")
    assert not taps.model.stem._forward_hooks


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
    taps.recording = True
    return taps


def stopped(taps, paths, last="body"):
    """Which layers run until ``paths`` have."""
    taps.model.ran.clear()
    taps.clear()
    with taps.stopping_after([f"body.{path}" for path in paths], last):
        taps.model(torch.ones(1, 1))
    return "".join(taps.model.ran)


RUNS = [("a", "a"), ("c", "abc"), ("bc", "abc"), ("cb", "abc"), ("d", "abcd")]


@pytest.mark.parametrize("paths, ran", RUNS)
def test_forward_ends_after_the_last_that_is_read(chain, paths, ran):
    assert stopped(chain, paths) == ran
    assert chain.recorded == [f"body.{name}" for name in ran]
    chain.recording, x = False, torch.ones(1, 1)
    for name in ran:
        x = chain.model.body.get_submodule(name)(x)
        assert torch.equal(chain.output(f"body.{name}"), x)


def test_gradients_of_what_has_run(chain):
    stopped(chain, "b")
    chain.output("body.b").sum().backward()
    assert [layer.weight.grad is not None for layer in chain.model.body] == [True, True, False, False]


def test_forward_ends_at_the_last_even_if_one_does_not_run(chain):
    """A module that this forward leaves out."""
    chain.model.other = nn.Linear(1, 1)
    chain.add("other")
    for last, ran in (("body.c", "abc"), ("body", "abcd")):
        chain.model.ran.clear()
        with chain.stopping_after(["other", "body.a"], last):
            chain.model(torch.ones(1, 1))
        assert "".join(chain.model.ran) == ran


def test_the_last_may_itself_be_read(chain):
    with chain.stopping_after(["body", "body.a"], last="body"):
        chain.model(torch.ones(1, 1))
    assert chain.model.ran == ["a", "b", "c", "d"] and chain.has("body")


def test_without_paths_it_runs_to_its_end(chain):
    assert stopped(chain, "") == "abcdend"


def test_it_runs_to_its_end_while_not_recording(chain):
    chain.recording = False
    assert stopped(chain, "a") == "abcdend"


def test_the_next_forward_is_whole_again(chain):
    assert stopped(chain, "a") == "a"
    chain.model.ran.clear()
    chain.clear()
    assert chain.model(torch.ones(1, 1)).shape == (1, 1)
    assert "".join(chain.model.ran) == "abcdend"
    assert stopped(chain, "b") == "ab"


def test_what_follows_the_forward_runs(chain):
    after = []
    with chain.stopping_after(["body.a"], "body"):
        chain.model(torch.ones(1, 1))
        after.append("inside")
    after.append("outside")
    assert after == ["outside"] and chain.has("body.a")


@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyboardInterrupt])
def test_errors_are_not_swallowed(chain, error):
    def fail(*_):
        raise error("in the model")

    handle = chain.model.body.b.register_forward_pre_hook(fail)
    with pytest.raises(error, match="in the model"):
        stopped(chain, "c")
    handle.remove()
    chain.model.ran.clear()
    chain.model(torch.ones(1, 1))  # nothing is awaited any more
    assert "".join(chain.model.ran) == "abcdend"
