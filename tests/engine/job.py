"""A student and its distillation in a folder, and the two scripts' runs of them in this process."""

from distill_d2.engine import argument_parser, main
from distill_d2.testing.tiny import (
    distiller_config,
    save_teacher,
    tiny_config,
    use_dataset,
    write_dataset,
)


class Job:
    """Configs of a student and its distillation, and the two scripts' job in this process."""

    def __init__(self, folder, family="retinanet", **student):
        self.folder = folder
        self.entry = write_dataset(folder / "data")
        student_cfg = tiny_config(family, **student)
        student_cfg.VERSION = 2
        use_dataset(student_cfg, self.entry)
        teacher = save_teacher(tiny_config(family, width=16), folder / "teacher")
        self.config = distiller_config(student_cfg, teacher)
        self.config.OUTPUT_DIR = str(folder / "output")
        self.config_file = str(folder / "config.yaml")
        self.text = None  # of the file, instead of the config's

    def arguments(self, *arguments, opts=()):
        with open(self.config_file, "w") as file:
            file.write(self.text or self.config.dump())
        return argument_parser().parse_args(
            ["--num-gpus", "0", "--config-file", self.config_file, *arguments, *map(str, opts)]
        )

    def run(self, *arguments, distill=True, opts=()):
        return main(self.arguments(*arguments, opts=opts), distill)
