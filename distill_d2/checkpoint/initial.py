"""Modules that have pretrained weights of their own, such as backbones of timm.

Such a module has an attribute ``weights``, which names them ("": none), and a method ``load_initial_weights()``,
which is called when a training starts without MODEL.WEIGHTS. It is not called when a checkpoint is loaded, which
holds all that is needed.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

_METHOD = "load_initial_weights"


def load_initial_weights(model: nn.Module) -> None:
    """Call the method of all modules that have it. Raises what they raise."""
    for module in model.modules():
        if hasattr(module, _METHOD):
            getattr(module, _METHOD)()


def initial_weights(model: nn.Module) -> list[str]:
    """The names of these weights."""
    named = [module.weights for module in model.modules() if hasattr(module, _METHOD)]
    return [str(name) for name in named if name]


def check_backbones(model: nn.Module, missing: Collection[str], source: str) -> None:
    """Check that a checkpoint has all tensors of such modules.

    Args:
        missing: names of the model's tensors that are not in the checkpoint.
        source: the key and the checkpoint, for the message.

    Raises:
        ValueError: tensors of a module are missing.
    """
    for prefix, module in model.named_modules():
        if not hasattr(module, _METHOD):
            continue
        names = [
            f"{prefix}.{name}"
            for name in module.state_dict()
            if not name.endswith("num_batches_tracked")
        ]
        lacks = [name for name in names if name in missing]
        if lacks:
            raise ValueError(
                f"{source} lacks {len(lacks)} of the {len(names)} tensors of the {type(module).__name__} "
                f"'{prefix}', such as {lacks[:3]}. Weights of a whole detector with this backbone are expected "
                'there; write MODEL.WEIGHTS "" to start from the backbone\'s own (MODEL.TIMM.WEIGHTS)'
            )
