"""What is trained: pairs of a student and a teacher, and for each pair the rows of its table."""

from __future__ import annotations

from dataclasses import dataclass

TEACHER = "teacher"
ALONE = "student"
DOUBLED = "student_doubled"
SAME_TIME = "student_same_time"


@dataclass(frozen=True)
class Row:
    """A row of a pair's table.

    Attributes:
        name: of its folder; of a method, its config is configs/proof/<pair>_<name>.yaml.
        title: in the table.
        seconds: per iteration on one core, to tell hours before a run here has measured them. Measured on an AMD
            EPYC: RetinaNet's teacher and student alone. The others are estimates.
    """

    name: str
    title: str
    seconds: float


@dataclass(frozen=True)
class Pair:
    """A teacher and a student.

    Attributes:
        methods: the distillations of the student.
        best: so many of the methods, the best on val, are trained with more seeds.
        timed: whether the student alone is also trained for the wall time of the slowest method.
        taught_by: the pair whose teacher it shares; "": it has its own.
        keeps_teacher: whether the teacher's outputs can be kept, as its images are not cropped.
    """

    name: str
    title: str
    teacher: Row
    alone: Row
    methods: tuple[Row, ...]
    best: int = 0
    timed: bool = False
    taught_by: str = ""
    keeps_teacher: bool = True

    @property
    def doubled(self) -> Row:
        return Row(DOUBLED, "student alone, twice the schedule", self.alone.seconds)

    @property
    def same_time(self) -> Row:
        return Row(SAME_TIME, "student alone, same wall time", self.alone.seconds)

    @property
    def controls(self) -> tuple[Row, ...]:
        """The student alone, trained for longer."""
        return (self.doubled, self.same_time) if self.timed else (self.doubled,)

    @property
    def rows(self) -> tuple[Row, ...]:
        """In the order of the table."""
        return (self.teacher, self.alone, *self.controls, *self.methods)

    def config(self, row: Row) -> str:
        """The name of a row's packaged config."""
        own = row.name if row in (self.teacher, *self.methods) else ALONE
        return f"proof/{self.name}_{own}.yaml"


RETINANET = Pair(
    "retinanet",
    "RetinaNet, EfficientNet-Lite2 to EfficientNet-Lite0 up to stride 16",
    Row(TEACHER, "teacher", 0.26),
    Row(ALONE, "student alone", 0.07),
    (
        Row("pkd", "PKD", 0.08),
        Row("mimic", "FeatureMimic", 0.08),
        Row("icd", "ICD", 0.08),
        Row("gid", "GID", 0.09),
        Row("defeat", "DeFeat", 0.08),
        Row("fgfi", "FGFI", 0.08),
    ),
    best=2,
    timed=True,
)
CROPS = Pair(
    "crops",
    "The same RetinaNets, students trained with random crops, too",
    RETINANET.teacher,
    Row(ALONE, "student alone, crops", 0.08),
    (Row("pkd", "PKD, crops", 0.11),),
    timed=True,
    taught_by="retinanet",
    keeps_teacher=False,
)
RCNN = Pair(
    "rcnn",
    "Faster R-CNN, EfficientNet-Lite2 to EfficientNet-Lite0 up to stride 16",
    Row(TEACHER, "teacher", 0.35),
    Row(ALONE, "student alone", 0.12),
    (
        Row("headkd", "HeadKD", 0.13),
        Row("defeat", "DeFeat, neck and classes", 0.15),
        Row("pkd", "PKD", 0.13),
    ),
)
SSD = Pair(
    "ssd",
    "SSD, EfficientNet-Lite2 to EfficientNet-Lite0",
    Row(TEACHER, "teacher", 0.26),
    Row(ALONE, "student alone", 0.07),
    (
        Row("ssdkd_paper", "SSDKD, the paper's losses", 0.08),
        Row("ssdkd_repository", "SSDKD, the repository's losses", 0.08),
    ),
)
PAIRS = {pair.name: pair for pair in (RETINANET, CROPS, RCNN, SSD)}
#: What --only names.
METHODS = list(dict.fromkeys(row.name for pair in PAIRS.values() for row in pair.methods))
