"""Deformable convolutions by torchvision's operator, so that detectron2 need not be compiled."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec
from detectron2.modeling import build_resnet_backbone
from detectron2.modeling.backbone import ResNet
from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import nn
from torchvision.ops import deform_conv2d

_TAPS = 9  # of a 3x3 kernel


class DeformConv2d(Conv2d):
    """A convolution whose taps are moved and, with a mask, weighted (Zhu et al., Deformable ConvNets v2,
    arXiv 1811.11168). Same parameters as detectron2's DeformConv and ModulatedDeformConv."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self, x: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Args:
            x: (N, C, H, W).
            offset: (N, 18 g, H', W'), of each tap dy, dx in cells, for g groups of channels.
            mask: (N, 9 g, H', W').
        """
        # Not in half precision: a cell is found by its fraction.
        x, offset = x.to(self.weight.dtype), offset.to(self.weight.dtype)
        mask = None if mask is None else mask.to(self.weight.dtype)
        geometry = (self.stride, self.padding, self.dilation)
        x = deform_conv2d(x, offset, self.weight, self.bias, *geometry, mask)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)


def offset_and_mask(prediction: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of (N, 27 g, H, W), offsets (N, 18 g, H, W) and, after a sigmoid, the mask (N, 9 g, H, W)."""
    third = prediction.shape[1] // 3
    offset, mask = prediction.split([2 * third, third], dim=1)
    return offset, mask.sigmoid()


class DFConv2d(nn.Module):
    """A modulated 3x3 convolution and the ordinary one that predicts its offsets and mask."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.offset = nn.Conv2d(in_channels, 3 * _TAPS, kernel_size=3, padding=1)
        self.conv = DeformConv2d(in_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H, W)."""
        return self.conv(x, *offset_and_mask(self.offset(x)))


class DeformBottleneckBlock(BottleneckBlock):
    """detectron2's block of that name, made of an ordinary one, with the same parameters."""

    def __init__(self, plain: BottleneckBlock, modulated: bool, groups: int):
        """
        Args:
            plain: whose parts this takes over, but for the 3x3 convolution.
            modulated: with a mask.
            groups: of channels that have offsets of their own.
        """
        CNNBlockBase.__init__(self, plain.in_channels, plain.out_channels, plain.stride)
        self.modulated = modulated
        self.shortcut, self.conv1, self.conv3 = plain.shortcut, plain.conv1, plain.conv3
        old = plain.conv2
        geometry = {"kernel_size": 3, **{k: getattr(old, k) for k in ("stride", "padding", "dilation")}}
        taps = (3 if modulated else 2) * _TAPS
        self.conv2_offset = Conv2d(old.in_channels, taps * groups, **geometry)
        nn.init.zeros_(self.conv2_offset.weight)
        nn.init.zeros_(self.conv2_offset.bias)
        self.conv2 = DeformConv2d(
            old.in_channels,
            old.out_channels,
            **geometry,
            groups=old.groups,
            bias=False,
            norm=old.norm,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu_(self.conv1(x))
        predicted = self.conv2_offset(out)
        moved = offset_and_mask(predicted) if self.modulated else (predicted,)
        out = self.conv3(F.relu_(self.conv2(out, *moved)))
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


def build_resnet(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """detectron2's build_resnet_backbone, which needs its compiled operator for DEFORM_ON_PER_STAGE.

    Raises:
        ValueError: deformable stages of a ResNet of basic blocks.
    """
    node = cfg.MODEL.RESNETS
    if not any(node.DEFORM_ON_PER_STAGE):
        return build_resnet_backbone(cfg, input_shape)
    if node.DEPTH < 50:
        raise ValueError(
            f"MODEL.RESNETS.DEFORM_ON_PER_STAGE is {node.DEFORM_ON_PER_STAGE}, DEPTH {node.DEPTH}; only "
            "bottleneck blocks (DEPTH 50, 101 or 152) can be deformable"
        )
    plain = cfg.clone()
    plain.defrost()
    plain.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False] * 4
    resnet = build_resnet_backbone(plain, input_shape)
    for deform, name in zip(node.DEFORM_ON_PER_STAGE, ("res2", "res3", "res4", "res5")):
        stage = getattr(resnet, name, ()) if deform else ()
        for index, block in enumerate(stage):
            stage[index] = DeformBottleneckBlock(block, node.DEFORM_MODULATED, node.DEFORM_NUM_GROUPS)
    return resnet.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)
