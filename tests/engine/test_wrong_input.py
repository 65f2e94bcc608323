"""Wrong input: one clear message, before training (law 10). Most would cost hours if found late."""

from pathlib import Path

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from runs import Job

from distill_d2.engine.setup import choose_device
from distill_d2.testing import save_teacher, tiny_config


def test_a_wrong_value_stops_a_run_before_data_are_read(job):
    """The tables themselves: tests/laws/test_key_values.py."""
    Path(job.entry["JSON"]).write_text("not read")
    job.fails(ValueError, "SOLVER.MAX_ITER is 0; expected an integer", opts=["SOLVER.MAX_ITER", 0])
    job.fails(ValueError, "MODEL.RETINANET.NUM_CLASSES is 0", opts=["MODEL.RETINANET.NUM_CLASSES", 0])
    job.fails(ValueError, "MODEL.DEVICE is 'gpu'", opts=["MODEL.DEVICE", "gpu"])
    with pytest.raises(ValueError, match="INPUT.MAX_SIZE_TEST is 0"):
        job.run("--eval-only", opts=["SOLVER.MAX_ITER", 0, "INPUT.MAX_SIZE_TEST", 0])


@pytest.mark.parametrize("distill", [False, True])
def test_what_detectron2_asserts_while_it_builds_a_model_is_told(tmp_path, distill):
    """That the levels of the regions' heads are a pyramid, in this case."""
    job = Job(tmp_path, "faster")
    opts = ["MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p4"]]
    job.fails(ValueError, "cannot be built from its config", "pyramid", distill=distill, opts=opts)


def test_a_wrong_value_of_a_teacher_names_its_file(job):
    path = job.node.MODEL_DISTILLER_CONFIG
    text = Path(path).read_text()
    Path(path).write_text(text.replace("  RETINANET:\n", "  RETINANET:\n    PRIOR_PROB: 2.0\n"))
    job.fails(ValueError, f"the teacher's config '{path}': MODEL.", "PRIOR_PROB is 2.0; expected")


def test_teacher_config_not_found(job):
    job.node.MODEL_DISTILLER_CONFIG = "retinanet_teacher.yaml"
    job.fails(FileNotFoundError, "retinanet_teacher.yaml")


def test_official_teacher_not_in_the_zoo(job):
    job.node.MODEL_LOAD_OFFICIAL = True
    job.node.MODEL_DISTILLER_CONFIG = "COCO-Detection/no_such.yaml"
    job.fails(FileNotFoundError, "COCO-Detection/no_such.yaml", "MODEL_LOAD_OFFICIAL False")


def test_a_teacher_that_is_a_file_is_not_looked_for_in_the_zoo(job):
    job.node.MODEL_LOAD_OFFICIAL = True
    assert not job.setup().MODEL.DISTILLER.MODEL_LOAD_OFFICIAL


def test_teacher_weights_missing(job):
    job.node.TEACHER_WEIGHTS = "nowhere.pth"
    job.fails(FileNotFoundError, "nowhere.pth", "MODEL.DISTILLER.TEACHER_WEIGHTS")


def test_teacher_weights_of_another_architecture(job):
    save_teacher(tiny_config("faster", width=16), job.folder / "other")
    job.node.TEACHER_WEIGHTS = str(job.folder / "other" / "teacher.pth")
    job.fails(ValueError, "missing in the file", "head.cls_score.weight", "not in the model")


def test_dataset_that_is_not_registered(job):
    job.config.DATASETS.TRAIN = (job.entry["NAME"] + "x",)
    job.fails(ValueError, job.entry["NAME"] + "x", job.entry["NAME"], "DATASETS.CUSTOM")


def test_classes_of_dataset_and_model_differ(job):
    job.config.MODEL.RETINANET.NUM_CLASSES = 80
    job.fails(ValueError, "MODEL.RETINANET.NUM_CLASSES", "80", "3")


def test_dataset_that_cannot_be_evaluated(job):
    job.setup()  # registers the dataset
    metadata = MetadataCatalog.get(job.entry["NAME"]).__dict__
    metadata["evaluator_type"] = "sem_seg"
    job.fails(ValueError, job.entry["NAME"], "'sem_seg'", "pascal_voc")
    metadata.update(evaluator_type="coco", json_file="no.json")
    job.fails(ValueError, job.entry["NAME"], "'no.json'", "DATASETS.CHECK none")


def test_resume_from_another_model(job):
    job.run(distill=False)
    job.config.MODEL.RETINANET.NUM_CONVS = 2
    with pytest.raises(ValueError, match="is from another model") as caught:
        job.run("--resume", distill=False)
    assert "head.cls_subnet.2.weight" in str(caught.value)


def test_resume_with_other_losses(job):
    job.run()
    job.node.TYPES = ["FeatureMimic"]
    job.node.FEATURE_MIMIC.IN_FEATURES = ["res3"]
    with pytest.raises(ValueError, match="of other losses.*FeatureMimic"):
        job.run("--resume")


def test_evaluation_with_weights_of_another_model(job):
    job.run(distill=False)
    job.config.MODEL.RETINANET.NUM_CONVS = 2
    weights = f"{job.output}/model_final.pth"
    with pytest.raises(ValueError, match="do not fill the model"):
        job.run("--eval-only", opts=["MODEL.WEIGHTS", weights])
    with pytest.raises(ValueError, match="needs weights"):
        job.run("--eval-only", opts=["OUTPUT_DIR", job.folder / "empty"])


def test_misspelled_key_on_the_command_line(job):
    job.fails(KeyError, "SOLVER.MAX_ITERS", "SOLVER.MAX_ITER", opts=["SOLVER.MAX_ITERS", 5])


def test_misspelled_key_in_the_file(job):
    job.text = "MODEL: {DISTILLER: {TYPE: [PKD]}}\n"
    job.fails(KeyError, "MODEL.DISTILLER.TYPE", job.config_file)


def test_output_folder_that_cannot_be_written(job):
    (job.folder / "file").write_text("")
    job.config.OUTPUT_DIR = str(job.folder / "file" / "output")
    with pytest.raises(OSError, match="OUTPUT_DIR .*cannot be written"):
        job.run()


def test_yaml_with_a_python_tag(job):
    job.text = "SEED: !!python/object/apply:os.getpid []\n"
    job.fails(ValueError, "yaml tag", job.config_file, "line 1")


def test_batch_that_does_not_divide(job, monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    with pytest.raises(ValueError, match="SOLVER.IMS_PER_BATCH is 2; expected a multiple of the 3"):
        job.run()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_that_is_not_there(job):
    assert choose_device("cuda", 0) == "cpu"
    with pytest.raises(ValueError, match="--num-gpus 0"):
        choose_device("cuda", 1)


@pytest.mark.parametrize("device", ["gpu", "", "meta"])
def test_device_that_torch_cannot_use(device):
    with pytest.raises(ValueError, match=f"MODEL.DEVICE is '{device}'"):
        choose_device(device, 0)


def test_emulated_bfloat16_is_refused(job, monkeypatch):
    monkeypatch.setattr("distill_d2.teacher.running.native_bfloat16", lambda device: False)
    monkeypatch.setattr("distill_d2.engine.settings.native_bfloat16", lambda device: False)
    job.fails(ValueError, "SOLVER.AMP.ENABLED", opts=["SOLVER.AMP.ENABLED", True])
    job.node.TEACHER_AUTOCAST = "bfloat16"
    job.fails(ValueError, "MODEL.DISTILLER.TEACHER_AUTOCAST", "emulates")
