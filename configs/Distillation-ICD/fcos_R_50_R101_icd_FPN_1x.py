# The student is detectron2's FCOS with R-50, schedule 1x; the teacher is AdelaiDet's with R-101.
from detectron2.model_zoo import get_config

_student = get_config("COCO-Detection/fcos_R_50_FPN_1x.py")
model, train = _student.model, _student.train
optimizer, lr_multiplier = _student.optimizer, _student.lr_multiplier
dataloader = _student.dataloader

distiller = dict(
    TYPES=["InstanceConditionalDistillation"],
    MODEL_LOAD_OFFICIAL=False,
    MODEL_DISTILLER_CONFIG="Teachers/FCOS_R101_2x_ms.yaml",
    INS=dict(INPUT_FEATS=["p3", "p4", "p5", "p6", "p7"], MAX_LABELS=300),
    INS_ATT_MIMIC=dict(WEIGHT_VALUE=8.0),
)
