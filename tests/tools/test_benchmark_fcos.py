"""tools/benchmark_fcos.py: that it compares equals."""

import benchmark_fcos as tool
import torch
from detectron2.utils.events import EventStorage


def arguments(*more):
    return tool.make_parser().parse_args(["--height", "64", "--width", "96", "--rounds", "3", *more])


def test_both_compute_the_same():
    args = arguments()
    models = tool.build_pair(args)
    batch = tool.generated_batch(args, 80)
    assert len(batch) == 2 and len(batch[0]["instances"]) == 10
    for found, expected in zip(*(tool.inference(model, batch) for model in models)):
        assert len(found) == len(expected) > 10
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-5)
    with torch.no_grad(), EventStorage(0):
        losses = [model.train()(batch) for model in models]
    assert losses[0].keys() == losses[1].keys()


def test_rounds_alternate_and_are_printed(capsys):
    order, models = [], {tool.PROJECT: "project", tool.DETECTRON2: "detectron2"}
    times = tool.measure(lambda model, _batch: order.append(model), models, [], arguments())
    assert times.keys() == models.keys() and all(len(seconds) == 3 for seconds in times.values())
    assert order[:2] == order[2:4][::-1] and len(order) == 8
    tool.print_phase("inference", {tool.PROJECT: [1.0, 3.0, 2.0], tool.DETECTRON2: [2.0, 2.0, 2.0]})
    output = capsys.readouterr().out
    assert "inference: projects/FCOS / detectron2 1.000 (0.500 to 1.500 in 3 rounds)" in output
    assert "| projects/FCOS | 2000 | 1000 | 3000 |" in " ".join(output.split())
