"""Made-up runs: folders with files as a run leaves them."""

import json

from distill_d2.run_files import METRICS


def run_of(folder, *lines, name=METRICS):
    """A run's folder, with these lines in metrics.json or another file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def evaluation(shift=0.0, prefix="bbox", iteration=1, **more):
    """A line of metrics.json with an evaluation."""
    values = {"AP": 40.0, "AP50": 60.0, "AP50-dog": 70.0, "AP50-tv-set": 50.0, **more}
    scalars = {f"{prefix}/{name}": value + shift for name, value in values.items()}
    return {"iteration": iteration, "time": 0.5, **scalars}
