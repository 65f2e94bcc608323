"""ICD's settings: the keys of the reference implementation, in its three nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from ..settings import IN_FEATURES, LossSettings, key, no_key
from .mimic import LOSS_FORMS, NORMS
from .sampling import SAMPLE_RULES

_root = partial(key, node="")
_ins = partial(key, node="INS")
_mimic = partial(key, node="INS_ATT_MIMIC")

_NOT_READ = "Not read; it exists so that the reference's yaml files load."
_ONE_CLASS = "Name of the reference's only class."
_OTHER_METHODS = "the only one; another method is a distillation loss of its own (MODEL.DISTILLER.TYPES)"


@dataclass(frozen=True)
class ICDSettings(LossSettings):
    bypass_distill: int = _root(
        1000,
        "First iteration (from 0) at which gradients of the distillation reach the student; before it, "
        "only the student's value projection is trained by it.",
    )
    bypass_distill_after: int = _root(99999999, "Last iteration at which they reach the student.")
    stop_joint: int = _root(9999999, "Last iteration at which the decoder is trained.")
    distill_off: int = _root(0, "0: no gradients reach the student outside these iterations.")
    distill_on: int = _root(1, "0: no gradients reach the student inside these iterations.")

    input_feats: Sequence[str] = _ins((), IN_FEATURES)
    num_classes: int = _ins(0, "Number of classes of the ground truth; 0: the student's.", at_least=0)
    hidden_dim: int = _ins(
        256, "Channels of the decoder; other levels get a 1x1 convolution.", at_least=1
    )
    att_heads: int = _ins(8, "Attention heads of the decoder.", at_least=1)
    att_layers: int = _ins(
        1, "Layers of the decoder; 0: attention alone, without a residual.", at_least=0
    )
    project_pos: bool = _ins(True, "A linear layer on the positional embedding.")
    use_pos_embedding: bool = _ins(True, "Add the positional embedding to the keys.")
    decoder_posemb_on_v: bool = _ins(False, "Add the positional embedding to the values, too.")
    distill_norm: str = _ins(
        "ln", "Normalize both sides' values per head (ln), or the teacher's (tln).", choices=NORMS
    )
    dropout: float = _ins(0.0, "Dropout of the attention weights.", at_least=0, below=1)
    add_scale_indicator: bool = _ins(True, "Describe an instance by its rough width and height, too.")
    sample_rule: str = _ins(
        "relative",
        "Slots per image: NUM_NEG_POS_RATIO fakes per instance and at most MAX_LABELS slots (relative), "
        "or NUM_LABELS slots (fixed).",
        choices=SAMPLE_RULES,
    )
    num_neg_pos_ratio: float = _ins(5.0, "Fakes per instance.", at_least=0)
    num_labels: int = _ins(100, "Slots per image with SAMPLE_RULE fixed.", at_least=1)
    max_labels: int = _ins(300, "Most slots per image with SAMPLE_RULE relative.", at_least=1)
    uniform_sample_class: bool = _ins(False, "Draw all classes of fakes equally often.")
    uniform_sample_box: bool = _ins(False, "Draw sizes of fakes without statistics.")
    confidence_loss_weight: float = _ins(1.0, "Weight of the auxiliary existence loss.", at_least=0)
    value_reconst: float = _ins(-1.0, "Above 0: add a loss that reconstructs features from values.")
    reference_bugs: bool = _ins(
        False,
        "As the authors' code: boxes are binned by the size of the batch's last image, and a TEMP_VALUE "
        "below 0 is 1 and adds the constant 1 to the loss.",
    )

    weight_value: float = _mimic(8.0, "Weight of the distillation; 0 or less: no distillation.")
    temp_value: float = _mimic(1.0, "Temperature of the attention weights.")
    temp_decay: bool = _mimic(False, "Move the temperature linearly to TEMP_DECAY_TO over the run.")
    temp_decay_to: float = _mimic(1.0, "Temperature at the end of the run.", above=0)
    distill_negative: bool = _mimic(False, "The attention of fakes counts, too.")
    loss_form: str = _mimic("mse", "Distance of the values.", choices=LOSS_FORMS)
    sample_range: float = _mimic(
        0.3, "Jitter of an instance's point, as a fraction of its box's size.", at_least=0, at_most=0.5
    )

    teacher: str = _root("ModelTeacher_II", _ONE_CLASS)
    task_name: str = _ins("InstanceEncoder", _ONE_CLASS)
    decoder: str = _ins("DecoderWrapper", _ONE_CLASS)
    ignore_distill: Sequence[str] = _root(("",), _NOT_READ)
    distill_with_pos: bool = _ins(False, _NOT_READ)
    temp_mask: float = _mimic(1.0, _NOT_READ)

    # The reference has other keys for a schedule.
    weight: float = no_key(1.0)
    start_iter: int = no_key(0)
    stop_iter: int = no_key(-1)
    warmup_iters: int = no_key(0)

    def __post_init__(self) -> None:
        super().__post_init__()
        heads = self.att_heads
        multiple = f"a multiple of INS.ATT_HEADS, which is {heads}"
        self.require("hidden_dim", self.hidden_dim % heads == 0, multiple)
        # The positional embedding is half for the row, half for the column; layer norm of 1 channel is 0.
        fits = self.hidden_dim % 2 == 0 and self.hidden_dim > heads
        expected = f"an even number, at least twice INS.ATT_HEADS ({heads})"
        self.require("hidden_dim", fits, expected)
        reason = "below 0 the reference names the temperature learnable, but gives it no gradient"
        fits = self.temp_value > 0 or (self.temp_value < 0 and self.reference_bugs)
        self.require("temp_value", fits, f"above 0 ({reason})")
        for name in ("teacher", "task_name", "decoder"):
            default = getattr(type(self), name)
            self.require(name, getattr(self, name) == default, f"'{default}', {_OTHER_METHODS}")
