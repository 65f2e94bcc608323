# The student is detectron2's new baseline with R-50, 100 epochs; the teacher is the one with R-101, 400.
from detectron2.model_zoo import get_config

_student = get_config("new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py")
model, train = _student.model, _student.train
optimizer, lr_multiplier = _student.optimizer, _student.lr_multiplier
dataloader = _student.dataloader

distiller = dict(
    TYPES=["InstanceConditionalDistillation"],
    MODEL_DISTILLER_CONFIG="new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ.py",
    INS=dict(INPUT_FEATS=["p2", "p3", "p4", "p5", "p6"], MAX_LABELS=100),
    INS_ATT_MIMIC=dict(WEIGHT_VALUE=3.0),
)
