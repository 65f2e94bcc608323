"""tools/benchmark_fcos.py: that it compares equals."""

import re

import benchmark_fcos as tool
import torch
from detectron2.utils.events import EventStorage


def arguments(*more):
    return tool.make_parser().parse_args(["--height", "64", "--width", "96", "--rounds", "1", *more])


def test_both_compute_the_same():
    args = arguments()
    ours, theirs = tool.build_pair(args)
    batch = tool.generated_batch(args, 80)
    assert len(batch) == 2 and len(batch[0]["instances"]) == 10
    for found, expected in zip(tool.inference(ours, batch), tool.inference(theirs, batch)):
        assert len(found) == len(expected) > 10
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-5)
    with torch.no_grad(), EventStorage(0):
        losses = [model.train()(batch) for model in (ours, theirs)]
    assert losses[0].keys() == losses[1].keys()


def test_rounds_alternate():
    order = []
    models = {tool.PROJECT: "ours", tool.DETECTRON2: "theirs"}
    args = arguments("--rounds", "3")
    times = tool.measure(lambda model, _batch: order.append(model), models, [], args)
    assert {name: len(seconds) for name, seconds in times.items()} == {
        tool.PROJECT: 3,
        tool.DETECTRON2: 3,
    }
    assert order[:2] == order[2:4][::-1] and len(order) == 8


def test_what_is_printed(capsys):
    tool.print_phase("inference", {tool.PROJECT: [1.0, 3.0, 2.0], tool.DETECTRON2: [2.0, 2.0, 2.0]})
    output = capsys.readouterr().out
    assert "inference: projects/FCOS / detectron2 1.000 (0.500 to 1.500 in 3 rounds)" in output
    assert re.search(r"projects/FCOS +\| +2000 +\| +1000 +\| +3000", output)
