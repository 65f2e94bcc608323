"""The first stage of a ResNet, replaced by an encoder and a decoder with a thin waist between them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.evaluation import DatasetEvaluator
from torch import nn

from .evaluator import TransmittedBytes
from .quantizer import rounded

ENCODER_WIDTHS = (64, 256, 64)
DECODER_WIDTHS = (64, 128)


class BottleneckStage(nn.Module):
    """Stands in for a ResNet's res2 (torchvision's layer1): same input, same shape of output.

    Matsubara and Levorato, "Neural Compression and Filtering for Edge-assisted Real-time Object
    Detection in Challenged Networks", ICPR 2020. A device computes stem and encoder and sends the
    encoder's output, a server does the rest. All convolutions are 2x2 of stride 1; the encoder's pad by
    1 and enlarge the map by one each, the decoder's do not and shrink it again. Batch norms are
    ordinary ones, also where the rest of the network has frozen ones.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: int = 3,
        *,
        encoder_widths: Sequence[int] = ENCODER_WIDTHS,
        decoder_widths: Sequence[int] = DECODER_WIDTHS,
        quant_bits: int = 0,
        reference_bugs: bool = False,
    ):
        """
        Args:
            in_channels: of the stem, 64 in an ordinary ResNet.
            out_channels: of the replaced stage: 256 in ResNet-50 and deeper, 64 in ResNet-18 and 34.
            channels: of the encoder's output, which is sent.
            encoder_widths: channels after the encoder's first three convolutions (the fourth has
                ``channels``).
            decoder_widths: channels after the decoder's first two convolutions (the last two have
                ``out_channels``).
            quant_bits: in evaluation, round what is sent to 8 or 16 bits per number; 0: float32.
            reference_bugs: of ``quantizer.quantize``.

        Raises:
            ValueError: a number of channels is below 1, the number of widths is wrong, or quant_bits is
                not 0, 8 or 16.
        """
        super().__init__()
        _check(channels, encoder_widths, decoder_widths, quant_bits)
        self.quant_bits = quant_bits
        self.reference_bugs = reference_bugs
        #: Shape (N, channels, H + 4, W + 4) of what was sent for the last batch in evaluation.
        self.transmitted: torch.Size | None = None
        first, second, third = encoder_widths
        self.encoder = nn.Sequential(
            _convolution(in_channels, first, padding=1),
            nn.BatchNorm2d(first),
            _convolution(first, second, padding=1),
            nn.BatchNorm2d(second),
            nn.ReLU(inplace=True),
            _convolution(second, third, padding=1),
            nn.BatchNorm2d(third),
            _convolution(third, channels, padding=1),
        )
        first, second = decoder_widths
        self.decoder = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            _convolution(channels, first),
            nn.BatchNorm2d(first),
            _convolution(first, second),
            nn.BatchNorm2d(second),
            nn.ReLU(inplace=True),
            _convolution(second, out_channels),
            nn.BatchNorm2d(out_channels),
            _convolution(out_channels, out_channels),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From the stem's output (N, in_channels, H, W) to (N, out_channels, H, W), which is >= 0."""
        sent = self.encoder(x)
        if not self.training:
            self.transmitted = sent.shape
            sent = rounded(sent, self.quant_bits, reference_bugs=self.reference_bugs)
        return self.decoder(sent)

    def evaluator(self) -> DatasetEvaluator:
        """What ``distill_d2.evaluation`` adds to the evaluators of a model with this stage."""
        return TransmittedBytes(self)


def _convolution(in_channels: int, out_channels: int, padding: int = 0) -> nn.Conv2d:
    # torch's own initialization, as in torchdistill, which made the published results.
    return nn.Conv2d(in_channels, out_channels, kernel_size=2, padding=padding, bias=False)


def _check(
    channels: int, encoder_widths: Sequence[int], decoder_widths: Sequence[int], quant_bits: int
) -> None:
    expected = {"CHANNELS": 1, "ENCODER_WIDTHS": 3, "DECODER_WIDTHS": 2}
    found = {
        "CHANNELS": [channels],
        "ENCODER_WIDTHS": list(encoder_widths),
        "DECODER_WIDTHS": list(decoder_widths),
    }
    for key, values in found.items():
        if len(values) != expected[key] or min(values) < 1:
            raise ValueError(
                f"MODEL.BOTTLENECK.{key} is {values}; expected {expected[key]} of numbers of channels, "
                "each at least 1"
            )
    if quant_bits not in (0, 8, 16):
        raise ValueError(
            f"MODEL.BOTTLENECK.QUANT_BITS is {quant_bits}; expected 8, 16, or 0 (as it is, float32)"
        )
