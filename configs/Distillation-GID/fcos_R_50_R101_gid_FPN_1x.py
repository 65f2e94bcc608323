# The student is detectron2's FCOS with R-50, schedule 1x; train its teacher before it.
from detectron2.model_zoo import get_config

_student = get_config("COCO-Detection/fcos_R_50_FPN_1x.py")
model, train = _student.model, _student.train
optimizer, lr_multiplier = _student.optimizer, _student.lr_multiplier
dataloader = _student.dataloader

distiller = dict(
    TYPES=["GID"],
    MODEL_LOAD_OFFICIAL=False,
    MODEL_DISTILLER_CONFIG="Distillation-GID/teacher/fcos_R_101_FPN_2x.py",
    TEACHER_WEIGHTS="output/fcos_R_101_FPN_2x/model_final.pth",
    PRELOAD_FPN=False,
    PRELOAD_HEAD=False,
    GID=dict(RESPONSE_MASK="inside", RESPONSE_REG_MODE="GIoU"),
)
