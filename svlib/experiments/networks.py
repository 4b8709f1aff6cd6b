"""The networks of the paper, with He's initialization.

They have no dropout. Each has a variant with BatchNorm before every ReLU, but not at the output.
"""

from __future__ import annotations

import math
from typing import TypeVar, cast

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from svlib import _check
from svlib._random import stream

Model = TypeVar("Model", bound=nn.Module)


def he_(model: Model, seed: int) -> Model:
    """He (Kaiming) initialization of every linear and convolutional layer of a model, in place.

    Weights become Gaussian of variance 2/fan-in, biases 0. Everything else, such as normalization
    or an embedding, stays as it is.

    Args:
        model: Any torch module.
        seed: Seed of the weights.

    Returns:
        The model.

    Examples:
        >>> layer = he_(nn.Linear(800, 500), seed=0)
        >>> print(f"{layer.weight.detach().var():.4f}", float(layer.bias.detach().abs().max()))
        0.0025 0.0
    """
    generator = stream(seed, "weights")
    for layer in model.modules():
        if not isinstance(layer, nn.Linear | _ConvNd):
            continue
        fan_in: float = layer.weight[0].numel()
        if isinstance(layer, _ConvTransposeNd):  # an output position sees 1/stride of the kernel
            inputs = layer.in_channels / layer.groups
            fan_in = inputs * math.prod(layer.kernel_size) / math.prod(layer.stride)
        nn.init.normal_(layer.weight, 0.0, math.sqrt(2 / fan_in), generator=generator)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return model


def _conv_block(
    inputs: int, outputs: int, kernel: int, batchnorm: bool, *, stride: int = 1, padding: int = 0
) -> list[nn.Module]:
    norm: list[nn.Module] = [nn.BatchNorm2d(outputs)] if batchnorm else []
    return [nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding), *norm, nn.ReLU()]


def mlp(
    features: int, *, width: int, depth: int, outputs: int, batchnorm: bool = False, seed: int
) -> nn.Sequential:
    """Fully connected ReLU network: (inputs, features) to (inputs, outputs).

    Args:
        features: Input features.
        width: Units of every hidden layer.
        depth: Number of weight matrices.
        outputs: Output features.
        batchnorm: Put BatchNorm before every ReLU.
        seed: Seed of the weights.

    Examples:
        >>> mlp(8, width=16, depth=3, outputs=2, seed=0)(torch.ones(5, 8)).shape
        torch.Size([5, 2])
    """
    features, width = _check.integer("features", features), _check.integer("width", width)
    depth, outputs = _check.integer("depth", depth), _check.integer("outputs", outputs)
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):  # constructors draw weights that he_ replaces
        for layer in range(depth - 1):
            layers += [nn.Linear(features if layer == 0 else width, width)]
            layers += [nn.BatchNorm1d(width)] if batchnorm else []
            layers += [nn.ReLU()]
        layers += [nn.Linear(features if depth == 1 else width, outputs)]
    return he_(nn.Sequential(*layers), seed)


def all_cnn_c(
    width: int = 96, *, channels: int = 3, classes: int = 10, batchnorm: bool = False, seed: int
) -> nn.Sequential:
    """ALL-CNN-C of Springenberg et al. 2015 (arXiv:1412.6806, table 1): images to class scores.

    It has nine convolutions, two of them of stride 2 instead of pooling, then the mean over
    positions. All 3 x 3 convolutions but the seventh are padded. Shapes: (inputs, channels, height,
    width) with sides of at least 9 to (inputs, classes); published for 3 x 32 x 32. The published
    dropout, and ReLU on the scores, are left out.

    Args:
        width: Channels of the first three convolutions, 96 as published; the next five have twice
            as many.
        channels: Input channels.
        classes: Number of classes.
        batchnorm: Put BatchNorm before every ReLU.
        seed: Seed of the weights.

    Examples:
        >>> all_cnn_c(width=8, seed=0)(torch.ones(5, 3, 32, 32)).shape
        torch.Size([5, 10])
    """
    n, channels = _check.integer("width", width), _check.integer("channels", channels)
    classes = _check.integer("classes", classes)
    with torch.random.fork_rng(devices=[]):
        layers = [
            *_conv_block(channels, n, 3, batchnorm, padding=1),
            *_conv_block(n, n, 3, batchnorm, padding=1),
            *_conv_block(n, n, 3, batchnorm, padding=1, stride=2),
            *_conv_block(n, 2 * n, 3, batchnorm, padding=1),
            *_conv_block(2 * n, 2 * n, 3, batchnorm, padding=1),
            *_conv_block(2 * n, 2 * n, 3, batchnorm, padding=1, stride=2),
            *_conv_block(2 * n, 2 * n, 3, batchnorm),
            *_conv_block(2 * n, 2 * n, 1, batchnorm),
            nn.Conv2d(2 * n, classes, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        ]
    return he_(nn.Sequential(*layers), seed)


class UNet(nn.Module):
    """U-Net of Ronneberger et al. 2015 (arXiv:1505.04597): images to a score per pixel.

    It has two 3 x 3 convolutions per level, max-pooling down, 2 x 2 transposed convolutions up, and
    skip connections. Unlike the published one it pads, so that the size stays. Shapes: (inputs,
    channels, height, width), sides divisible by 2**levels, to (inputs, 1, height, width).

    Args:
        width: Channels of the first level, 64 as published, doubled at each level.
        levels: Number of poolings, 4 as published.
        channels: Input channels.
        batchnorm: Put BatchNorm before every ReLU.
        seed: Seed of the weights.

    Examples:
        >>> UNet(width=4, levels=2, seed=0)(torch.ones(5, 1, 32, 32)).shape
        torch.Size([5, 1, 32, 32])
    """

    def __init__(
        self,
        width: int = 64,
        *,
        levels: int = 4,
        channels: int = 1,
        batchnorm: bool = False,
        seed: int,
    ) -> None:
        super().__init__()
        width, channels = _check.integer("width", width), _check.integer("channels", channels)
        self.levels = _check.integer("levels", levels)

        def pair(inputs: int, outputs: int) -> nn.Sequential:
            blocks = [_conv_block(i, outputs, 3, batchnorm, padding=1) for i in (inputs, outputs)]
            return nn.Sequential(*blocks[0], *blocks[1])

        widths = [width * 2**level for level in range(self.levels + 1)]
        with torch.random.fork_rng(devices=[]):
            self.down = nn.ModuleList(
                pair(a, b) for a, b in zip([channels, *widths], widths, strict=False)
            )
            self.up = nn.ModuleList(
                nn.ConvTranspose2d(2 * n, n, 2, stride=2) for n in reversed(widths[:-1])
            )
            self.join = nn.ModuleList(pair(2 * n, n) for n in reversed(widths[:-1]))
            self.last = nn.Conv2d(width, 1, 1)
        he_(self, seed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores (inputs, 1, height, width) of images (inputs, channels, height, width)."""
        if x.ndim != 4 or any(side % 2**self.levels for side in x.shape[2:]):
            wanted = f"(inputs, channels, height, width), sides divisible by {2**self.levels}"
            raise ValueError(f"x must have shape {wanted}, got {tuple(x.shape)}")
        skips = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else nn.functional.max_pool2d(x, 2))
            skips.append(x)
        for up, join, skip in zip(self.up, self.join, reversed(skips[:-1]), strict=True):
            x = join(torch.cat([skip, up(x)], 1))
        return cast(torch.Tensor, self.last(x))
