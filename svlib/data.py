"""Data that needs no network connection: Gaussian inputs, scikit-learn's digits, drawn membranes.

Images are float32 tensors (inputs, channels, height, width), standardized by the mean and deviation of the training images.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from scipy.spatial import cKDTree
from sklearn.datasets import load_digits

from svlib import _check
from svlib._random import stream


class Split(NamedTuple):
    """Training and held-out data; labels are int64 classes (inputs,) or 0/1 masks (inputs, 1, height, width)."""

    images: torch.Tensor
    labels: torch.Tensor
    held_out_images: torch.Tensor
    held_out_labels: torch.Tensor


def gaussian(samples: int, features: int, *, seed: int) -> torch.Tensor:
    """White noise, the paper's inputs: (samples, features), float32.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is below 1 or the seed negative.

    Examples:
        >>> gaussian(3, 4, seed=0).shape
        torch.Size([3, 4])
    """
    shape = _check.integer("samples", samples), _check.integer("features", features)
    return torch.randn(shape, generator=stream(seed, "data"))


def digits(size: int = 16) -> Split:
    """The 1,797 handwritten digits of scikit-learn, 8 x 8 pixels, enlarged by linear interpolation.

    At 16 x 16 the published ALL-CNN-C fits: its maps shrink to 8, 4 and 2 pixels a side. The last 360 images, in
    the order they come, are held out.

    Args:
        size: Side of the enlarged image, at least 8.

    Returns:
        Images (1437 and 360, 1, size, size), labels 0 to 9.

    Raises:
        TypeError: If ``size`` is not an integer.
        ValueError: If ``size`` is below 8.

    Examples:
        >>> digits().images.shape
        torch.Size([1437, 1, 16, 16])
    """
    size = _check.integer("size", size, 8)
    bunch = load_digits()
    images = ndimage.zoom(bunch.images, (1, size / 8, size / 8), order=1)[:, None]
    return _split(images, bunch.target.astype(np.int64), 1437)


def membranes(images: int = 128, held_out: int = 32, *, size: int = 64, seed: int) -> Split:
    """Drawn electron micrographs: dark membranes between cells, with texture, blur and noise.

    Cells are Voronoi cells on a smoothly warped plane, and membrane (label 1, about 30 % of all pixels)
    is what lies within 1.2 pixels of a border. A stand-in for the ISBI 2012 stack of real micrographs.

    Args:
        images: Number of training images.
        held_out: Number of held-out images.
        size: Side in pixels, at least 16.
        seed: Seed of the drawing.

    Returns:
        Images (inputs, 1, size, size), masks of the same shape, float32.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is out of range or the seed negative.

    Examples:
        >>> membranes(4, 2, size=32, seed=0).held_out_labels.shape
        torch.Size([2, 1, 32, 32])
    """
    images, held_out = _check.integer("images", images), _check.integer("held_out", held_out)
    size = _check.integer("size", size, 16)
    generator = np.random.default_rng(_check.integer("seed", seed, 0))
    drawn = [_micrograph(size, generator) for _ in range(images + held_out)]
    return _split(np.stack([image for image, _ in drawn])[:, None], np.stack([mask for _, mask in drawn])[:, None], images)


def _smooth_noise(size: int, scale: float, generator: np.random.Generator) -> np.ndarray:
    noise = ndimage.gaussian_filter(generator.normal(size=(size, size)), scale, mode="wrap")
    return np.asarray(noise / noise.std())


def _micrograph(size: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    spacing = 14.0  # typical diameter of a cell in pixels
    centres = generator.uniform(-spacing, size + spacing, (int(((size + 2 * spacing) / spacing) ** 2), 2))
    plane = np.moveaxis(np.indices((size, size), dtype=float), 0, -1)
    warp = np.stack([_smooth_noise(size, spacing / 3, generator) for _ in range(2)], -1)
    distances, nearest = map(np.asarray, cKDTree(centres).query(plane + 2.0 * warp, k=2))  # (size, size, 2) each
    apart = np.linalg.norm(np.diff(centres[nearest], axis=2)[..., 0, :], axis=-1)
    to_border = (distances[..., 1] ** 2 - distances[..., 0] ** 2) / (2 * apart)
    mask = (to_border < 1.2).astype(np.float32)
    light = 1.0 + 0.15 * _smooth_noise(size, 2.0, generator) - 0.8 * mask
    return ndimage.gaussian_filter(light, 0.7) + 0.12 * generator.normal(size=(size, size)), mask


def _split(images: np.ndarray, labels: np.ndarray, training: int) -> Split:
    mean, deviation = images[:training].mean(), images[:training].std()
    x = torch.from_numpy(((images - mean) / deviation).astype(np.float32))
    y = torch.from_numpy(labels)
    return Split(x[:training], y[:training], x[training:], y[training:])
