"""Names of the files that a run leaves in its OUTPUT_DIR, for those who write and those who read them."""

from __future__ import annotations

import os

#: The best student by TEST.KEEP_BEST, its weights and metadata.
BEST = "model_best.pth"
#: A line of json per logged iteration, as detectron2 writes it; evaluations in training are among its scalars.
METRICS = "metrics.json"
#: A line of json per evaluation outside of training: of --eval-only, and of the teacher in TEACHER_FOLDER.
EVALUATIONS = "evaluations.json"
#: A line of json per evaluation in training: each loss term's value, and the norm of its gradient.
GRADIENTS = "gradients.jsonl"
#: What the names of scalars in METRICS begin with: the weights that GRADIENT_RATIO has set, by loss.
WEIGHT = "weight/"
#: The command lines that trained and evaluated.
COMMANDS = "commands.txt"
#: The student alone, and the whole distillation.
STUDENT_FILE = "config.yaml"
DISTILLATION_FILE = "distill_config.yaml"
#: Inside OUTPUT_DIR, with files of the same names about the teacher.
TEACHER_FOLDER = "teacher"

EXPECTED_RUN = (
    "expected the OUTPUT_DIR of a training, a config (.yaml or .py) with weights, or a file that "
    "`distill-d2 export` wrote (.pth)"
)


def check_run(run: str) -> None:
    """Raises FileNotFoundError if the path of a run does not exist; a config may be a packaged one."""
    if not run.endswith((".yaml", ".yml", ".py")) and not os.path.exists(os.path.expanduser(run)):
        raise FileNotFoundError(f"the run '{run}' does not exist; {EXPECTED_RUN}")
