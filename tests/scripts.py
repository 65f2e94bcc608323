"""A run of one of the two scripts on a config, in the test's process."""

import json

from distill_d2.engine import argument_parser, main


def run_script(folder, cfg, distill, *arguments):
    """Train, or what ``arguments`` say, with OUTPUT_DIR ``folder``/output.

    Returns:
        what the script's main function does, and the names of the losses that were logged.
    """
    cfg.OUTPUT_DIR = str(folder / "output")
    path = folder / "config.yaml"
    path.write_text(cfg.dump())
    arguments = ["--num-gpus", "0", "--config-file", str(path), *arguments]
    result = main(argument_parser().parse_args(arguments), distill)
    lines = (folder / "output" / "metrics.json").read_text().splitlines()
    return result, {name for line in lines for name in json.loads(line) if name.startswith("loss_")}
