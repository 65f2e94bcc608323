"""ICD's keys: names, defaults, and errors that name the key (law 10)."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from detectron2.config import CfgNode as CN
from icd_case import Case

from distill_d2.losses.icd import InstanceConditionalDistillation

DISTILLER, INS, MIMIC = "MODEL.DISTILLER.", "MODEL.DISTILLER.INS.", "MODEL.DISTILLER.INS_ATT_MIMIC."
# The reference's keys; this project takes levels and classes from the detectors instead.
DEFAULTS = {
    "": {
        "TEACHER": "ModelTeacher_II",
        "BYPASS_DISTILL": 1000,
        "BYPASS_DISTILL_AFTER": 99999999,
        "STOP_JOINT": 9999999,
        "DISTILL_OFF": 0,
        "DISTILL_ON": 1,
        "IGNORE_DISTILL": [""],
    },
    "INS": {
        "TASK_NAME": "InstanceEncoder",
        "DECODER": "DecoderWrapper",
        "HIDDEN_DIM": 256,
        "ATT_HEADS": 8,
        "ATT_LAYERS": 1,
        "PROJECT_POS": True,
        "USE_POS_EMBEDDING": True,
        "DECODER_POSEMB_ON_V": False,
        "DISTILL_WITH_POS": False,
        "DISTILL_NORM": "ln",
        "DROPOUT": 0.0,
        "ADD_SCALE_INDICATOR": True,
        "SAMPLE_RULE": "relative",
        "NUM_NEG_POS_RATIO": 5.0,
        "NUM_LABELS": 100,
        "MAX_LABELS": 300,
        "UNIFORM_SAMPLE_CLASS": False,
        "UNIFORM_SAMPLE_BOX": False,
        "CONFIDENCE_LOSS_WEIGHT": 1.0,
        "VALUE_RECONST": -1.0,
    },
    "INS_ATT_MIMIC": {
        "WEIGHT_VALUE": 8.0,
        "TEMP_VALUE": 1.0,
        "TEMP_DECAY": False,
        "TEMP_DECAY_TO": 1.0,
        "TEMP_MASK": 1.0,
        "DISTILL_NEGATIVE": False,
        "LOSS_FORM": "mse",
        "SAMPLE_RANGE": 0.3,
    },
}


def node():
    distiller = CN({"SOLVER": CN({"OPTIMIZER": "ADAMW"})})
    InstanceConditionalDistillation.add_config(distiller)
    return distiller


def build(**settings):
    return InstanceConditionalDistillation(**settings)


def test_keys_have_the_references_defaults():
    distiller = node()
    for name, keys in DEFAULTS.items():
        found = distiller[name] if name else distiller
        for key, value in keys.items():
            assert found[key] == value and type(found[key]) is type(value), key


OTHERS = {"TEACHER": "ModelTeacher", "INS.TASK_NAME": "Other", "INS.DECODER": "Other"}


@pytest.mark.parametrize("path", OTHERS)
def test_other_classes_of_the_reference(path):
    distiller = node()
    distiller.merge_from_list([path, OTHERS[path]])
    message = rf"MODEL.DISTILLER.{path} is '{OTHERS[path]}'; expected '.*', the only"
    with pytest.raises(ValueError, match=message):
        InstanceConditionalDistillation.from_config(distiller)


WRONG = [
    (INS + "HIDDEN_DIM is 20; .* INS.ATT_HEADS, which is 8", {"hidden_dim": 20}),
    (INS + "HIDDEN_DIM is 9; expected an even number", {"hidden_dim": 9, "att_heads": 3}),
    (INS + "HIDDEN_DIM is 8; .* at least twice INS.ATT_HEADS", {"hidden_dim": 8, "att_heads": 8}),
    (MIMIC + "TEMP_VALUE is -1.0; expected above 0", {"temp_value": -1.0}),
    (MIMIC + "TEMP_VALUE is 0.0", {"temp_value": 0.0, "reference_bugs": True}),
]


@pytest.mark.parametrize("message, settings", WRONG, ids=[str(settings) for _, settings in WRONG])
def test_wrong_values_name_their_key(message, settings):
    with pytest.raises(ValueError, match=message):
        build(**settings)


def test_learnable_temperature_needs_the_references_bugs():
    assert build(temp_value=-1.0, reference_bugs=True).temperature(0, 1) == 1.0


def test_unknown_number_of_classes():
    """The detector of the maps is of no kind whose classes are known."""
    with pytest.raises(ValueError, match=INS + "NUM_CLASSES is 0, .*MapDetector is unknown; set it"):
        case = Case()
        case.loss.settings = replace(case.loss.settings, num_classes=0)
        case.loss.bind(*case.views())


def statistics(classes):
    sizes = np.full((classes, 2), 0.1)
    return SimpleNamespace(counts=np.arange(classes), mean=sizes, std=sizes)


def test_fewer_classes_than_the_training_data():
    with pytest.raises(ValueError, match="NUM_CLASSES is 7, but .* class 9"):
        Case(statistics=statistics(10))
    Case(statistics=statistics(7))


def test_statistics_are_not_asked_for_where_not_needed():
    case = Case(uniform_sample_class=True, uniform_sample_box=True)
    case.loss.use_statistics(lambda: pytest.fail("computed"))
    case.loss.bind(*case.views())
