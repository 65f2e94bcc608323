"""A meta-architecture whose proposals are its detections."""

from __future__ import annotations

from typing import Any

from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.rcnn import ProposalNetwork

from distill_d2.plugins import register_if_free


@register_if_free(META_ARCH_REGISTRY)
class OneStageDetector(ProposalNetwork):
    """A backbone and a proposal generator of a complete detector, FCOS.

    In training it returns losses, in evaluation {"instances": Instances} per image, at the size that the
    input asks for.
    """

    def forward(self, batched_inputs: list[dict[str, Any]]):
        """As GeneralizedRCNN's."""
        outputs = super().forward(batched_inputs)
        if self.training:
            return outputs
        return [{"instances": output["proposals"]} for output in outputs]
