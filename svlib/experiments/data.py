"""Data of one kind: embedded (white noise, digits, drawn membranes), or from a folder of files.

Images are float32 tensors (inputs, channels, height, width), standardized by the mean and deviation
of the training images.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageSequence, UnidentifiedImageError
from scipy import ndimage
from scipy.spatial import cKDTree

from svlib import _check
from svlib._random import stream

FOLDER_VARIABLE = "SVLIB_DATA"
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
_CIFAR10_ARCHIVE, _CIFAR10_FOLDER = "cifar-10-binary.tar.gz", "cifar-10-batches-bin"
_CIFAR10_FILES = (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin")
_CIFAR10_RECORDS = 10_000  # in a file; a record is a label byte, 1024 red, 1024 green, 1024 blue
_MICROGRAPHS = "https://imagej.net/events/isbi-2012-segmentation-challenge"


class Split(NamedTuple):
    """Training and held-out data.

    Labels are int64 classes (inputs,) or 0/1 masks (inputs, 1, height, width). ``source`` names the
    data, ``sha256`` tells copies of them apart; it is empty for embedded data.
    """

    images: torch.Tensor
    labels: torch.Tensor
    held_out_images: torch.Tensor
    held_out_labels: torch.Tensor
    source: str
    sha256: str = ""


def gaussian(samples: int, *features: int, seed: int) -> torch.Tensor:
    """White noise, the paper's inputs: ``(samples, *features)``, float32.

    Examples:
        >>> gaussian(3, 4, seed=0).shape
        torch.Size([3, 4])
        >>> gaussian(3, 1, 8, 8, seed=0).shape
        torch.Size([3, 1, 8, 8])
    """
    shape = [
        _check.integer("samples", samples),
        *(_check.integer("features", size) for size in features),
    ]
    return torch.randn(shape, generator=stream(seed, "data"))


def digits(size: int = 16) -> Split:
    """The 1,797 handwritten digits of scikit-learn, 8 x 8 pixels, enlarged by linear interpolation.

    At 16 x 16 the published ALL-CNN-C fits: its maps shrink to 8, 4 and 2 pixels a side. The last
    360 images, in the order they come, are held out.

    Args:
        size: Side of the enlarged image, at least 8.

    Returns:
        Images (1437 and 360, 1, size, size), labels 0 to 9.

    Examples:
        >>> digits().images.shape
        torch.Size([1437, 1, 16, 16])
    """
    from sklearn.datasets import load_digits  # only here: its import takes a second

    size = _check.integer("size", size, 8)
    bunch = load_digits()
    images = ndimage.zoom(bunch.images, (1, size / 8, size / 8), order=1)[:, None]
    return _split(images, bunch.target.astype(np.int64), 1437, "scikit-learn's digits")


def membranes(images: int = 128, held_out: int = 32, *, size: int = 64, seed: int) -> Split:
    """Drawn electron micrographs: dark membranes between cells, with texture, blur and noise.

    Cells are Voronoi cells on a smoothly warped plane. Pixels within 1.2 pixels of a border are
    membrane (label 1, about 30 % of all). The drawings stand in for the ISBI 2012 stack of real
    micrographs.

    Args:
        images: Number of training images.
        held_out: Number of held-out images.
        size: Side in pixels, at least 16.
        seed: Seed of the drawing.

    Returns:
        Images (inputs, 1, size, size), masks of the same shape, float32.

    Examples:
        >>> membranes(4, 2, size=32, seed=0).held_out_labels.shape
        torch.Size([2, 1, 32, 32])
    """
    images, held_out = _check.integer("images", images), _check.integer("held_out", held_out)
    size = _check.integer("size", size, 16)
    generator = np.random.default_rng(_check.integer("seed", seed, 0))
    drawn = [_micrograph(size, generator) for _ in range(images + held_out)]
    return _split(
        np.stack([image for image, _ in drawn])[:, None],
        np.stack([mask for _, mask in drawn])[:, None],
        images,
        "drawn membranes",
    )


def _smooth_noise(size: int, scale: float, generator: np.random.Generator) -> np.ndarray:
    noise = ndimage.gaussian_filter(generator.normal(size=(size, size)), scale, mode="wrap")
    return np.asarray(noise / noise.std())


def _micrograph(size: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    spacing = 14.0  # typical diameter of a cell in pixels
    centres = generator.uniform(
        -spacing, size + spacing, (int(((size + 2 * spacing) / spacing) ** 2), 2)
    )
    plane = np.moveaxis(np.indices((size, size), dtype=float), 0, -1)
    warp = np.stack([_smooth_noise(size, spacing / 3, generator) for _ in range(2)], -1)
    distances, nearest = map(
        np.asarray, cKDTree(centres).query(plane + 2.0 * warp, k=2)
    )  # (size, size, 2) each
    apart = np.linalg.norm(np.diff(centres[nearest], axis=2)[..., 0, :], axis=-1)
    to_border = (distances[..., 1] ** 2 - distances[..., 0] ** 2) / (2 * apart)
    mask = (to_border < 1.2).astype(np.float32)
    light = 1.0 + 0.15 * _smooth_noise(size, 2.0, generator) - 0.8 * mask
    return ndimage.gaussian_filter(light, 0.7) + 0.12 * generator.normal(size=(size, size)), mask


def _split(images: np.ndarray, labels: np.ndarray, training: int, source: str) -> Split:
    mean, deviation = images[:training].mean(), images[:training].std()
    x = torch.from_numpy(((images - mean) / deviation).astype(np.float32))
    y = torch.from_numpy(labels)
    return Split(x[:training], y[:training], x[training:], y[training:], source)


def cifar10(folder: str | os.PathLike[str] | None = None) -> Split:
    """CIFAR-10 from its binary archive, or from the unpacked archive. No pickle is read.

    An archive must have the official SHA-256. An unpacked folder has no official one: ``source``
    calls it unverified, and ``sha256`` is that of its six files in order.

    Args:
        folder: Folder that holds cifar-10-binary.tar.gz or cifar-10-batches-bin; ``None`` takes the
            environment variable SVLIB_DATA. :func:`fetch_cifar10` fills one.

    Returns:
        Images (50,000 and 10,000, 3, 32, 32), labels 0 to 9; 0.8 GB.

    Raises:
        FileNotFoundError: If folder, archive or a file is missing; the message says where to get
            it.
        ValueError: If the archive's checksum, a file's size or a label is wrong.
    """
    place = _folder(folder, f"{_CIFAR10_ARCHIVE} or {_CIFAR10_FOLDER}", CIFAR10_URL)
    archive = place / _CIFAR10_ARCHIVE
    if archive.is_file():
        contents, copy, digest = _packed(archive), "official archive", CIFAR10_SHA256
    else:
        contents, copy = _unpacked(place), "binary layout, unverified copy"
        digest = _sha256(*contents.values())
    records = np.concatenate([_cifar10_file(*named) for named in contents.items()])
    return _from_bytes(
        records[:, 1:].reshape(-1, 3, 32, 32),
        records[:, 0].astype(np.int64),
        5 * _CIFAR10_RECORDS,
        f"CIFAR-10, {copy}",
        digest,
    )


def fetch_cifar10(folder: str | os.PathLike[str]) -> Path:
    """Download CIFAR-10's binary archive (170 MB) into a folder, unless it is there whole.

    A progress bar is shown. A download that was cut off, or has another SHA-256 than the official
    one, leaves nothing behind.

    Returns:
        Path of the archive.

    Raises:
        ValueError: If the download has another SHA-256.
        OSError: If the network or the disk fails.
    """
    import pooch  # only here: in a notebook without widgets its import of tqdm.auto warns

    path = pooch.retrieve(
        CIFAR10_URL, f"sha256:{CIFAR10_SHA256}", _CIFAR10_ARCHIVE, str(folder), progressbar=True
    )
    return Path(path)


def micrographs(folder: str | os.PathLike[str] | None = None, *, held_out: int = 5) -> Split:
    """Electron micrographs with their membranes, as in the ISBI 2012 challenge, from a folder.

    Either two folders, image and label, of 8-bit grey pictures with the same names; or two
    multi-page TIFFs, train-volume.tif and train-labels.tif. Labels are black (0) on membranes and
    white (1 or 255) in cells. The last sections are held out; numbered names are taken in the order
    of their numbers.

    Args:
        folder: Folder that holds them; ``None`` takes the environment variable SVLIB_DATA.
        held_out: Number of sections held out.

    Returns:
        Images (sections, 1, height, width), masks of the same shape, float32, 1 on membranes.

    Raises:
        FileNotFoundError: If folder or files are missing.
        ValueError: If a picture cannot be read, shapes differ, labels have other values, or no
            section is left.
    """
    held_out = _check.integer("held_out", held_out)
    place = _folder(
        folder, "image and label, or train-volume.tif and train-labels.tif", _MICROGRAPHS
    )
    if (place / "train-volume.tif").is_file():
        images, labels = _pages(place / "train-volume.tif"), _pages(place / "train-labels.tif")
    else:
        names = [path.name for path in (place / "image").glob("*.*")]
        names.sort(key=lambda name: (len(Path(name).stem), name))  # 2 before 10
        if not names:
            raise FileNotFoundError(
                f"folder must hold image and label with pictures of the same names, or "
                f"train-volume.tif and train-labels.tif ({_MICROGRAPHS}), got {place}"
            )
        images, labels = (
            [page for name in names for page in _pages(place / kind / name)]
            for kind in ("image", "label")
        )
    if len(shapes := {page.shape for page in images + labels}) > 1 or len(images) != len(labels):
        raise ValueError(
            f"images and labels must be as many and of one size, "
            f"got {len(images)} and {len(labels)} of {sorted(shapes)} in {place}"
        )
    if len(images) <= held_out:
        raise ValueError(
            f"held_out must be below the number of sections, {len(images)}, got {held_out}"
        )
    pixels, inside = np.stack(images)[:, None], np.stack(labels)[:, None]
    if bad := sorted(set(np.unique(inside).tolist()) - {0, 1, 255}):
        raise ValueError(
            f"labels must be 0 on membranes and 1 or 255 in cells, got {bad[:5]} in {place}"
        )
    return _from_bytes(
        pixels,
        (inside == 0).astype(np.float32),
        len(images) - held_out,
        f"{len(images)} micrographs",
        _sha256(pixels.tobytes(), inside.tobytes()),
    )


def _folder(folder: str | os.PathLike[str] | None, wanted: str, address: str) -> Path:
    given = os.environ.get(FOLDER_VARIABLE) if folder is None else folder
    hint = f"a folder with {wanted} ({address})"
    if not given:
        raise FileNotFoundError(
            f"folder (--data, or the environment variable {FOLDER_VARIABLE}) must name {hint}, "
            f"got none"
        )
    if not (path := Path(given)).is_dir():
        raise FileNotFoundError(f"folder must be {hint}, got {path}, which is none")
    return path


def _sha256(*contents: bytes) -> str:
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content)
    return digest.hexdigest()


def _packed(archive: Path) -> dict[str, bytes]:
    """The six files of the archive, whose checksum must be the official one."""
    content = archive.read_bytes()
    if (digest := _sha256(content)) != CIFAR10_SHA256:
        raise ValueError(
            f"{archive} must have SHA-256 {CIFAR10_SHA256}, got {digest} ({len(content):,} bytes): "
            f"it is damaged or truncated; delete it and get it again from {CIFAR10_URL}"
        )
    found = {}
    with tarfile.open(fileobj=io.BytesIO(content)) as members:
        for member in members:
            if file := members.extractfile(member):
                found[member.name] = file.read()
    for name in _CIFAR10_FILES:
        if (path := f"{_CIFAR10_FOLDER}/{name}") not in found:
            raise ValueError(f"{_CIFAR10_ARCHIVE} must hold {path}, got an archive without")
    return {name: found[f"{_CIFAR10_FOLDER}/{name}"] for name in _CIFAR10_FILES}


def _unpacked(place: Path) -> dict[str, bytes]:
    """The six files of the unpacked archive, in the folder or one below."""
    folder = place if (place / _CIFAR10_FILES[0]).is_file() else place / _CIFAR10_FOLDER
    if missing := [name for name in _CIFAR10_FILES if not (folder / name).is_file()]:
        raise FileNotFoundError(
            f"folder must hold {_CIFAR10_ARCHIVE} ({CIFAR10_URL}; fetch_cifar10 or --download "
            f"gets it) or {_CIFAR10_FOLDER} with {', '.join(missing)}, got {place}"
        )
    return {name: (folder / name).read_bytes() for name in _CIFAR10_FILES}


def _cifar10_file(name: str, content: bytes) -> np.ndarray:
    """The records (records, 3073) of one file, bytes."""
    if len(content) != (size := _CIFAR10_RECORDS * 3073):
        raise ValueError(
            f"{name} must have {size:,} bytes, got {len(content):,}: "
            f"it is truncated or no file of CIFAR-10"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, 3073)
    if len(bad := np.flatnonzero(records[:, 0] > 9)):
        raise ValueError(
            f"{name} must have labels 0 to 9, got {records[bad[0], 0]} in record {bad[0]} "
            f"({len(bad)} such)"
        )
    return records


def _pages(path: Path) -> list[np.ndarray]:
    """The pages of a picture, (height, width) bytes each."""
    try:
        with Image.open(path) as picture:
            read = [
                (page.mode, np.asarray(page.convert("L")))
                for page in ImageSequence.Iterator(picture)
            ]
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} must be there, got none: every image has a label of the same name"
        ) from None
    except (UnidentifiedImageError, OSError, SyntaxError, TypeError, KeyError) as error:
        # Pillow raises any of them where a TIFF is cut off
        raise ValueError(f"{path} must be a picture, it cannot be read: {error}") from None
    if bad := [mode for mode, _ in read if mode not in ("1", "L")]:
        raise ValueError(f"{path} must be 8-bit grey or black and white, got mode {bad[0]!r}")
    return [page for _, page in read]


def _from_bytes(
    pixels: np.ndarray, labels: np.ndarray, training: int, source: str, sha256: str
) -> Split:
    """Standardize bytes as :func:`_split` does, without float64 copies of them all."""
    counts = (
        np.sum([np.bincount(image.ravel(), minlength=256) for image in pixels[:training]], 0)
        / pixels[:training].size
    )
    levels = np.arange(256)
    mean = counts @ levels
    deviation = np.sqrt(counts @ (levels - mean) ** 2)
    if deviation == 0:
        raise ValueError(f"images must differ in some pixel, got {source} with one grey")
    x = torch.from_numpy(pixels).float().sub_(mean).div_(deviation)
    y = torch.from_numpy(labels)
    return Split(x[:training], y[:training], x[training:], y[training:], source, sha256)
