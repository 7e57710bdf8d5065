"""dlib's face recognition network: a real ResNet of 3 × 3 convolutions, with a new head.

It has 29 convolutions, 28 of them 3 × 3, and was trained on some 3 million photos of faces. The scale and the
shift per channel after each convolution are folded into its weight and bias, so that only ``nn.Conv2d`` and
ReLU are left, and no batch norms.

    python scripts/prepare_encoders.py .cache/assets --face-resnet
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d, pad, relu

PIXELS = 150  # what it was trained at
MEAN_RGB, DIVISOR = (122.782, 117.001, 104.298), 255.0
WIDTH, DESCRIPTOR = 256, 128
KERNEL = 3
# Each residual block's name, its channels in and out, and its stride.
BLOCKS = (
    *((f"conv32_{number}", 32, 32, 1) for number in (1, 2, 3)),
    ("conv64_down", 32, 64, 2),
    *((f"conv64_{number}", 64, 64, 1) for number in (1, 2, 3)),
    ("conv128_down", 64, 128, 2),
    *((f"conv128_{number}", 128, 128, 1) for number in (1, 2)),
    ("conv256_down", 128, 256, 2),
    *((f"conv256_{number}", 256, 256, 1) for number in (1, 2)),
    ("conv256_down_out", 256, 256, 2),
)


class FaceResNet(nn.Module):
    """The network; without ``classes`` its head is the published one, from features to a face's descriptor.

    Pictures have 64 pixels or more a side. Below 103 the last block strides over less than its kernel, which
    is padded with zeros; from there on this is the published function.
    """

    def __init__(self, classes: int | None) -> None:
        super().__init__()
        self.conv32_down = nn.Conv2d(3, 32, 7, stride=2)
        self.blocks = nn.Sequential(OrderedDict((name, Residual(*shape)) for name, *shape in BLOCKS))
        self.classifier = nn.Linear(WIDTH, classes or DESCRIPTOR, bias=classes is not None)

    @classmethod
    def load(cls, path: str | Path, classes: int | None) -> FaceResNet:
        """Read the published weights; a head for ``classes`` is new, and drawn at random."""
        model = cls(classes)
        weights = load_file(path)
        descriptor = weights.pop("descriptor.weight")
        head = {"weight": descriptor} if classes is None else model.classifier.state_dict()
        model.load_state_dict(weights | {f"classifier.{name}": tensor for name, tensor in head.items()})
        return model

    def features(self, pixel_values: Tensor) -> Tensor:
        """Turn pictures ``(n, 3, height, width)``, see ``normalised``, into features ``(n, 256)``."""
        hidden = max_pool2d(relu(self.conv32_down(pixel_values)), 3, stride=2)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden.mean(dim=(2, 3))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the head's logits (or descriptors, if the head is the published one)."""
        logits: Tensor = self.classifier(self.features(pixel_values))
        return logits


class Residual(nn.Module):
    """Two convolutions and a shortcut, which is pooled where the first convolution strides."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.strides = stride > 1
        self.conv1 = nn.Conv2d(inputs, outputs, KERNEL, stride, padding=0 if self.strides else 1)
        self.conv2 = nn.Conv2d(outputs, outputs, KERNEL, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        if self.strides:
            x = grown(x, (x.shape[1], KERNEL, KERNEL))
        hidden = self.conv2(relu(self.conv1(x)))
        shortcut = avg_pool2d(x, 2) if self.strides else x
        # A strided convolution of an even map ends a row and a column before the pool does.
        return relu(grown(hidden, shortcut.shape[1:]) + grown(shortcut, hidden.shape[1:]))


def grown(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Append zeros where ``(n, channels, height, width)`` is smaller than ``(channels, height, width)``."""
    channels, rows, columns = (max(0, new - old) for old, new in zip(x.shape[1:], shape, strict=True))
    return pad(x, (0, columns, 0, rows, 0, channels)) if channels or rows or columns else x


def normalised(pixels: Tensor) -> Tensor:
    """Turn pictures ``(n, 3, height, width)``, red first, from 0 … 255 into what the network takes."""
    mean = torch.tensor(MEAN_RGB, device=pixels.device).view(3, 1, 1)
    return (pixels.float() - mean) / DIVISOR
