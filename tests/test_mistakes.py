"""A user's mistake ends a program with its message alone and status 2; a programming error with its traceback."""

import logging

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from runs import Job
from torch._utils import ExceptionWrapper

from distill_d2.data.read_errors import UnreadableRecord
from distill_d2.engine import argument_parser, launch, main
from distill_d2.losses import build_losses
from distill_d2.mistakes import Message, ending_on_mistakes, is_mistake, message_of
from distill_d2.testing import tiny_config
from distill_d2.views import build_view


def a_key_is_missing():
    return {}["key"]


def a_text_is_not_a_number():
    return int("x")


def a_file_is_missing():
    open("missing")


def an_assertion():
    raise AssertionError("wrong")


def no_message():
    raise ValueError


def a_users_own(kind):
    raise kind("the value is wrong")


def full_disk():
    with open("/dev/full", "w") as file:
        file.write("x")


def of_a_worker():
    try:
        raise UnreadableRecord("the image 'a.jpg' cannot be used:\nline 2") from ValueError("cause")
    except UnreadableRecord:
        wrapper = ExceptionWrapper(where="in DataLoader worker process 0")
    wrapper.reraise()


def full_gpu():
    raise torch.cuda.OutOfMemoryError("CUDA out of memory")


def of_yacs():
    CfgNode({"SEED": 1}).merge_from_list(["SEED", "[1]"])


def of_a_registry():
    META_ARCH_REGISTRY.get("RetinaNets")


def of_a_view():
    build_view(META_ARCH_REGISTRY, "student")


MISTAKES = {
    lambda: build_losses(CfgNode({"TYPES": []})): "MODEL.DISTILLER.TYPES is []",
    lambda: a_users_own(ValueError): "the value is wrong",
    lambda: a_users_own(KeyError): "the value is wrong",
    lambda: a_users_own(ImportError): "the value is wrong",
    of_a_view: "has no module 'backbone'",
    of_a_worker: "the image 'a.jpg' cannot be used:\nline 2",
    of_yacs: "Type mismatch",
    of_a_registry: "No object named 'RetinaNets'",
    lambda: main(argument_parser().parse_args([]), distill=True): "--config-file is missing",
    full_disk: "No space left",
    full_gpu: "lower SOLVER.IMS_PER_BATCH",
}


@pytest.mark.parametrize("function", MISTAKES)
def test_mistakes(function):
    with pytest.raises(Exception) as caught:
        function()
    assert is_mistake(caught.value) and MISTAKES[function] in message_of(caught.value)
    assert not message_of(caught.value).startswith(("'", '"', "Caught"))


@pytest.mark.parametrize(
    "function",
    [
        *(a_key_is_missing, a_text_is_not_a_number, a_file_is_missing, an_assertion, no_message),
        *(lambda kind=kind: a_users_own(kind) for kind in (RuntimeError, AttributeError)),
        lambda: logging.getLogger().setLevel("LOUD"),  # a ValueError that Python raises
        lambda: tiny_config(surely=1),
    ],
)
def test_programming_errors(function, capsys):
    with pytest.raises(Exception) as caught, ending_on_mistakes():
        function()
    assert not is_mistake(caught.value) and not capsys.readouterr().err


def baseline(args):
    return main(args, distill=False)


@pytest.mark.parametrize("debug", [False, True])
def test_a_program_ends_with_the_message_alone(tmp_path, capsys, debug):
    """The loss is not finite in the first step: detectron2's training loop does not print it, either."""
    job = Job(tmp_path, evaluate=False)
    opts = ["SOLVER.BASE_LR", 1e38]
    args = job.arguments(*["--debug"] * debug, opts=opts)
    with pytest.raises(SystemExit) as ended:
        launch(baseline, args)
    assert ended.value.code == 2
    shown, log = capsys.readouterr(), (job.output / "log.txt").read_text()
    assert shown.err.splitlines()[-1].startswith("at iteration 1 these losses are not finite")
    assert len(shown.err.splitlines()) == 1 or debug
    assert ("Traceback" in shown.err) == debug and "Traceback" not in shown.out
    assert log.count("Traceback") == 1 and "FloatingPointError: at iteration 1" in log


def test_the_first_of_several_processes_tells(tmp_path, capsys):
    messages = [Message(str(tmp_path)) for _ in range(2)]
    for number, message in enumerate(messages):
        with pytest.raises(SystemExit) as ended, ending_on_mistakes(message=message):
            raise KeyError(f"process {number}")
        assert ended.value.code == 2
    assert messages[1].read() == "process 0" and not capsys.readouterr().err
