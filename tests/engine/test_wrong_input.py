"""Wrong input: one clear message, before training (law 10). Most would cost hours if found late."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.utils import comm

from distill_d2.testing.tiny import save_teacher, tiny_config


def fails(job, error, *messages, **run):
    """The job stops with this error, its message holds all of ``messages``, nothing was trained."""
    with pytest.raises(error) as caught:
        job.run(**run)
    for message in messages:
        assert message in str(caught.value)
    metrics = Path(job.config.OUTPUT_DIR) / "metrics.json"
    assert not metrics.exists() or not metrics.read_text()


def test_unknown_loss_lists_the_known(job):
    job.config.MODEL.DISTILLER.TYPES = ["PDK"]
    fails(job, ValueError, "MODEL.DISTILLER.TYPES", "['PDK']", "FeatureMimic", "PKD")


def test_no_loss(job):
    job.config.MODEL.DISTILLER.TYPES = []
    fails(job, ValueError, "MODEL.DISTILLER.TYPES is []")


def test_teacher_config_not_found(job):
    job.config.MODEL.DISTILLER.MODEL_DISTILLER_CONFIG = "retinanet_teacher.yaml"
    fails(job, FileNotFoundError, "retinanet_teacher.yaml")


def test_official_teacher_not_in_the_zoo(job):
    job.config.MODEL.DISTILLER.MODEL_LOAD_OFFICIAL = True
    job.config.MODEL.DISTILLER.MODEL_DISTILLER_CONFIG = "COCO-Detection/no_such.yaml"
    fails(job, FileNotFoundError, "COCO-Detection/no_such.yaml", "MODEL_LOAD_OFFICIAL False")


def test_teacher_weights_missing(job):
    job.config.MODEL.DISTILLER.TEACHER_WEIGHTS = "nowhere.pth"
    fails(job, FileNotFoundError, "nowhere.pth", "MODEL.DISTILLER.TEACHER_WEIGHTS")


def test_teacher_weights_truncated(job):
    whole = Path(job.folder / "teacher" / "teacher.pth")
    whole.write_bytes(whole.read_bytes()[:20000])
    fails(job, ValueError, str(whole), "truncated")


def test_teacher_weights_of_another_architecture(job):
    other = save_teacher(tiny_config("faster", width=16), job.folder / "other")
    job.config.MODEL.DISTILLER.TEACHER_WEIGHTS = other.replace("teacher.yaml", "teacher.pth")
    fails(job, ValueError, "missing in the file", "head.cls_score.weight", "not in the model")


def test_teacher_weights_that_run_code(job):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(job.folder / "executed"),)

    path = job.folder / "teacher.pkl"
    path.write_bytes(pickle.dumps({"model": Code(), "__author__": "x"}))
    job.config.MODEL.DISTILLER.TEACHER_WEIGHTS = str(path)
    fails(job, ValueError, str(path), "mkdir")
    assert not (job.folder / "executed").exists()


def test_level_that_does_not_exist(job):
    job.config.MODEL.DISTILLER.PKD.IN_FEATURES = ["p3", "p7"]
    fails(job, KeyError, "'p7'", "p2", "res4")


def test_strides_that_do_not_match(job):
    teacher = tiny_config(width=16)
    teacher.MODEL.BACKBONE.NAME = "build_resnet_backbone"  # res4 of stride 16, res5 of 16 when dilated
    teacher.MODEL.RESNETS.RES5_DILATION = 2
    teacher.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res5"]
    teacher.MODEL.RETINANET.IN_FEATURES = ["res2", "res3", "res5"]
    teacher.MODEL.RESNETS.DEPTH = 50
    teacher.MODEL.RESNETS.WIDTH_PER_GROUP = 8
    teacher.MODEL.RESNETS.STEM_OUT_CHANNELS = 8
    teacher.MODEL.RESNETS.RES2_OUT_CHANNELS = 16
    teacher.MODEL.RETINANET.NUM_CONVS = 0
    student = job.config
    student.MODEL.SMALL_RESNET.OUT_FEATURES = ["res3", "res4", "res5"]
    student.MODEL.RETINANET.IN_FEATURES = ["p3", "p4", "p5"]
    student.MODEL.DISTILLER.MODEL_DISTILLER_CONFIG = save_one_width(teacher, job.folder / "dilated")
    student.MODEL.DISTILLER.PKD.IN_FEATURES = ["res5"]
    fails(job, ValueError, "'res5'", "stride 32", "16")


def save_one_width(cfg, folder):
    # RetinaNet wants equal channels on all its levels; nothing here reads the head.
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.RPN.IN_FEATURES = ["res3"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32.0]]
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["res3"]
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    return save_teacher(cfg, folder)


def test_dataset_that_is_not_registered(job):
    job.config.DATASETS.TRAIN = (job.entry["NAME"] + "x",)
    fails(job, ValueError, job.entry["NAME"] + "x", job.entry["NAME"], "DATASETS.CUSTOM")


def test_dataset_path_without_annotations(job):
    os.remove(job.entry["JSON"])
    fails(job, OSError, job.entry["JSON"], "images")


def test_classes_of_dataset_and_model_differ(job):
    job.config.MODEL.RETINANET.NUM_CLASSES = 80
    fails(job, ValueError, "MODEL.RETINANET.NUM_CLASSES", "80", "3")


def test_dataset_that_cannot_be_evaluated(job):
    job.run(distill=False)  # registers the dataset
    (Path(job.config.OUTPUT_DIR) / "metrics.json").unlink()
    MetadataCatalog.get(job.entry["NAME"]).__dict__["evaluator_type"] = "sem_seg"
    fails(job, ValueError, job.entry["NAME"], "'sem_seg'", "pascal_voc")


def test_unreadable_image_is_named(job):
    broken = Path(job.entry["IMAGES"]) / "3.png"
    broken.write_bytes(broken.read_bytes()[:200])
    fails(job, ValueError, str(broken))


def test_resume_from_another_model(job):
    job.run(distill=False)
    job.config.MODEL.RETINANET.NUM_CONVS = 2
    with pytest.raises(ValueError, match="is of another model") as caught:
        job.run("--resume", distill=False)
    assert "head.cls_subnet.2.weight" in str(caught.value)


def test_resume_with_other_losses(job):
    job.run()
    job.config.MODEL.DISTILLER.TYPES = ["FeatureMimic"]
    job.config.MODEL.DISTILLER.FEATURE_MIMIC.IN_FEATURES = ["res3"]
    with pytest.raises(ValueError, match="of other losses.*FeatureMimic"):
        job.run("--resume")


def test_evaluation_with_weights_of_another_model(job):
    job.run(distill=False)
    job.config.MODEL.RETINANET.NUM_CONVS = 2
    weights = f"{job.config.OUTPUT_DIR}/model_final.pth"
    with pytest.raises(ValueError, match="do not fill the model"):
        job.run("--eval-only", opts=["MODEL.WEIGHTS", weights])
    with pytest.raises(ValueError, match="needs weights"):
        job.run("--eval-only", opts=["OUTPUT_DIR", job.folder / "empty"])


def test_misspelt_key_on_the_command_line(job):
    fails(job, KeyError, "SOLVER.MAX_ITERS", "SOLVER.MAX_ITER", opts=["SOLVER.MAX_ITERS", 5])


def test_misspelt_key_in_the_file(job):
    job.text = "MODEL: {DISTILLER: {TYPE: [PKD]}}\n"
    fails(job, KeyError, "MODEL.DISTILLER.TYPE", job.config_file)


@pytest.mark.parametrize("iterations", [0, -1])
def test_no_iterations(job, iterations):
    fails(job, ValueError, "SOLVER.MAX_ITER", str(iterations), opts=["SOLVER.MAX_ITER", iterations])


def test_output_folder_that_cannot_be_written(job):
    (job.folder / "file").write_text("")
    job.config.OUTPUT_DIR = str(job.folder / "file" / "output")
    with pytest.raises(OSError, match="OUTPUT_DIR .*cannot be written"):
        job.run()


def test_yaml_with_a_python_tag(job):
    job.text = "SEED: !!python/object/apply:os.getpid []\n"
    fails(job, ValueError, "yaml tag", job.config_file, "line 1")


def test_batch_that_does_not_divide(job, monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    with pytest.raises(ValueError, match="SOLVER.IMS_PER_BATCH is 2; expected a multiple of the 3"):
        job.run()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_that_is_not_there(job):
    from distill_d2.engine.setup import choose_device

    assert choose_device("cuda", 0) == "cpu"
    with pytest.raises(ValueError, match="--num-gpus 0"):
        choose_device("cuda", 1)


def test_unknown_optimizer(job):
    fails(job, ValueError, "SOLVER.OPTIMIZER is 'ADAMM'", "'AdamW'", opts=["SOLVER.OPTIMIZER", "ADAMM"])


def test_emulated_bfloat16_is_refused(job, monkeypatch):
    monkeypatch.setattr("distill_d2.teacher.running.native_bfloat16", lambda device: False)
    monkeypatch.setattr("distill_d2.engine.settings.native_bfloat16", lambda device: False)
    fails(job, ValueError, "SOLVER.AMP.ENABLED", opts=["SOLVER.AMP.ENABLED", True])
    job.config.MODEL.DISTILLER.TEACHER_AUTOCAST = "bfloat16"
    fails(job, ValueError, "MODEL.DISTILLER.TEACHER_AUTOCAST", "emulates")
