# detectron2's FCOS with R-101, schedule 2x.
from detectron2.model_zoo import get_config

_r50 = get_config("COCO-Detection/fcos_R_50_FPN_1x.py")
model, train = _r50.model, _r50.train
optimizer, dataloader = _r50.optimizer, _r50.dataloader
lr_multiplier = get_config("common/coco_schedule.py").lr_multiplier_2x

model.backbone.bottom_up.stages.depth = 101
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-101.pkl"
train.max_iter = 180000
