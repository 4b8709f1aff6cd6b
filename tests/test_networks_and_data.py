"""The networks as published, their initialization, and the embedded data."""

import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import svlib as sv


def test_all_cnn_c_is_the_published_one() -> None:
    model = sv.networks.all_cnn_c(seed=0)
    found = [
        (c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0])
        for c in model
        if isinstance(c, nn.Conv2d)
    ]
    assert found == [
        (3, 96, 3, 1), (96, 96, 3, 1), (96, 96, 3, 2), (96, 192, 3, 1), (192, 192, 3, 1),
        (192, 192, 3, 2), (192, 192, 3, 1), (192, 192, 1, 1), (192, 10, 1, 1),
    ]  # fmt: skip
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_369_738
    assert list(sv.probe(model, torch.rand(2, 3, 32, 32)).loc[:, "shape"])[-1] == (10, 6, 6)


@pytest.mark.parametrize("batchnorm", [False, True])
def test_every_layer_but_the_last_has_batchnorm(batchnorm: bool) -> None:
    models = [
        sv.networks.mlp(8, width=6, depth=4, outputs=2, batchnorm=batchnorm, seed=0),
        sv.networks.all_cnn_c(4, batchnorm=batchnorm, seed=0),
        sv.networks.UNet(4, levels=2, batchnorm=batchnorm, seed=0),
    ]
    for model in models:
        relus = sum(isinstance(module, nn.ReLU) for module in model.modules())
        norms = sum(
            isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in model.modules()
        )
        assert norms == (relus if batchnorm else 0)
        assert not any(isinstance(module, nn.Dropout) for module in model.modules())


def test_u_net_uses_every_level_and_skip() -> None:
    model = sv.networks.UNet(4, levels=3, seed=0)
    x = torch.rand(2, 1, 24, 16)
    rows = sv.probe(model, x)
    assert model(x).shape == (2, 1, 24, 16)
    assert len(rows) == 2 * 4 + 3 * 3 + 1
    assert [tuple(shape)[1:] for shape in rows.loc[rows.type == "ConvTranspose2d", "shape"]] == [
        (6, 4),
        (12, 8),
        (24, 16),
    ]
    with pytest.raises(ValueError, match=r"sides divisible by 8, got \(2, 1, 20, 16\)"):
        model(torch.rand(2, 1, 20, 16))


@pytest.mark.parametrize(
    ("layer", "shape", "inner"),
    [
        (nn.Linear(300, 400), (200, 300), ...),
        (nn.Linear(300, 400, bias=False), (200, 7, 300), ...),
        (nn.Conv1d(60, 300, 5), (50, 60, 40), ...),
        (nn.Conv2d(32, 200, 3, stride=2, dilation=2), (20, 32, 21, 21), ...),
        (nn.Conv2d(64, 256, 3, groups=4), (20, 64, 16, 16), ...),
        (nn.Conv3d(16, 100, 2), (10, 16, 8, 8, 8), ...),
        (nn.ConvTranspose1d(100, 200, 6, stride=3), (30, 100, 40), slice(5, -5)),
        (nn.ConvTranspose2d(64, 200, 2, stride=2), (20, 64, 16, 16), ...),
        (nn.ConvTranspose2d(128, 256, 4, stride=2, groups=4), (10, 128, 16, 16), slice(3, -3)),
    ],
)
def test_he_initialization_doubles_the_mean_square_of_white_noise(
    layer: nn.Module, shape: tuple[int, ...], inner: Any
) -> None:
    """So that ReLU, which halves it, brings it back; edges of transposed convolutions excepted."""
    model = sv.networks.he_(nn.Sequential(layer, nn.ReLU()), seed=1)
    y = layer(torch.randn(shape, generator=torch.Generator().manual_seed(0))).detach()
    y = y[..., inner] if y.ndim < 4 else y[..., inner, inner]
    assert float(y.square().mean()) == pytest.approx(2, rel=0.05)
    assert float(y.mean()) == pytest.approx(0, abs=0.1)
    weight = next(model.parameters()).detach()
    assert float((weight**4).mean() / weight.square().mean() ** 2) == pytest.approx(3, rel=0.1)


def test_he_initialization_of_any_model() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "words": nn.Embedding(9, 20),
            "deep": nn.ModuleList([nn.Linear(20, 30), nn.Sequential(nn.Conv1d(30, 30, 1))]),
            "norm": nn.BatchNorm1d(30),
        }
    )
    nn.init.constant_(model["norm"].bias, 0.5)  # type: ignore[arg-type]
    before = {name: x.clone() for name, x in model.state_dict().items()}
    state = torch.get_rng_state()
    assert sv.networks.he_(model, seed=3) is model
    assert torch.equal(torch.get_rng_state(), state)
    after = {name: x.clone() for name, x in model.state_dict().items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("deep")}
    assert not any(after[name].any() for name in changed if name.endswith("bias"))
    assert torch.equal(
        sv.networks.he_(model, seed=3).state_dict()["deep.0.weight"], after["deep.0.weight"]
    )
    assert not torch.equal(
        sv.networks.he_(model, seed=4).state_dict()["deep.0.weight"], after["deep.0.weight"]
    )


def test_he_initialization_keeps_the_total_variance() -> None:
    """Through a real forward pass, transposed convolution included."""
    generator = torch.Generator().manual_seed(0)
    layers = sv.networks.UNet(64, levels=1, seed=0)
    rows = sv.probe(layers, torch.randn(4, 1, 32, 32, generator=generator))
    hidden = rows[rows["name"].isin(["down.0.3", "down.1.3", "join.0.3"])].sigma2
    # layer 0 has 2; max-pooling raises, padding lowers it
    assert ((hidden > 1) & (hidden < 6)).all()
    up = layers.up[0]
    assert isinstance(up, nn.ConvTranspose2d)
    assert float(up.weight.detach().var()) == pytest.approx(2 / 128, rel=0.05)
    for layer in sv.networks.mlp(300, width=300, depth=3, outputs=300, seed=0):
        if isinstance(layer, nn.Linear):
            assert float(layer.weight.detach().var()) * 150 == pytest.approx(1, rel=0.03)
            assert layer.bias is not None
            assert not layer.bias.detach().any()


def test_seeds() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again, other = (sv.networks.all_cnn_c(4, seed=seed) for seed in (1, 1, 2))
    weights = [next(model.parameters()) for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(sv.data.gaussian(3, 2, seed=1), sv.data.gaussian(3, 2, seed=1))
    assert torch.equal(
        sv.data.membranes(2, 1, size=16, seed=1).images,
        sv.data.membranes(2, 1, size=16, seed=1).images,
    )


def test_scikit_learn_and_matplotlib_are_imported_on_first_use() -> None:
    rooms = ("comparison", "data", "networks", "training")
    code = f"import sys{''.join(f', svlib.experiments.{room}' for room in rooms)}\n"
    code += "print([name for name in ('sklearn', 'matplotlib') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_digits() -> None:
    split = sv.data.digits(32)
    assert split.images.shape == (1437, 1, 32, 32)
    assert split.held_out_images.shape == (360, 1, 32, 32)
    assert float(split.images.mean()) == pytest.approx(0, abs=1e-5)
    assert float(split.images.std()) == pytest.approx(1, abs=1e-4)
    assert set(split.labels.tolist()) == set(range(10))
    assert split.labels.dtype == torch.int64
    eight = sv.data.digits(8).images[:, 0].flatten(1)
    means = torch.stack([eight[split.labels == digit].mean(0) for digit in range(10)])
    guesses = torch.cdist(sv.data.digits(8).held_out_images[:, 0].flatten(1), means).argmin(1)
    right = float((guesses == split.held_out_labels).float().mean())
    assert right > 0.8  # images and labels belong together


def test_membranes() -> None:
    split = sv.data.membranes(8, 4, size=48, seed=3)
    assert split.images.shape == split.labels.shape == (8, 1, 48, 48)
    assert set(split.labels.flatten().tolist()) == {0.0, 1.0}
    assert 0.15 < float(split.labels.mean()) < 0.45
    dark, light = split.images[split.labels == 1].mean(), split.images[split.labels == 0].mean()
    assert dark < light - 1


def test_gaussian_is_white() -> None:
    x = sv.data.gaussian(2000, 50, seed=0)
    assert float(x.mean()) == pytest.approx(0, abs=4 / math.sqrt(x.numel()))
    assert float(x.var()) == pytest.approx(1, abs=4 * math.sqrt(2 / x.numel()))
    correlation = np.corrcoef(x.numpy().T) - np.eye(50)
    assert np.abs(correlation).max() < 0.13


MLP = {"features": 1, "width": 1, "depth": 1, "outputs": 1, "seed": 0}


@pytest.mark.parametrize(
    ("call", "given", "error", "message"),
    [
        (sv.networks.mlp, MLP | {"features": 0}, ValueError, "features must be at least 1, got 0"),
        (sv.networks.mlp, MLP | {"width": 0}, ValueError, "width must be at least 1"),
        (sv.networks.mlp, MLP | {"depth": 0}, ValueError, "depth must be at least 1"),
        (sv.networks.mlp, MLP | {"outputs": 1.5}, TypeError, "outputs must be an integer"),
        (sv.networks.mlp, MLP | {"seed": -1}, ValueError, "seed must be at least 0"),
        (sv.networks.all_cnn_c, {"width": 0, "seed": 0}, ValueError, "width must be at least 1"),
        (sv.networks.all_cnn_c, {"classes": 0, "seed": 0}, ValueError, "classes must be at least"),
        (sv.networks.UNet, {"levels": 0, "seed": 0}, ValueError, "levels must be at least 1"),
        (sv.data.gaussian, {"samples": 0, "seed": 0}, ValueError, "samples must be at least 1"),
        (partial(sv.data.gaussian, 1, 0), {"seed": 0}, ValueError, "features must be at least 1"),
        (sv.data.digits, {"size": 7}, ValueError, "size must be at least 8, got 7"),
        (sv.data.membranes, {"images": 0, "seed": 0}, ValueError, "images must be at least 1"),
        (sv.data.membranes, {"size": 8, "seed": 0}, ValueError, "size must be at least 16"),
        (sv.data.membranes, {"seed": None}, TypeError, "seed must be an integer"),
    ],
)
def test_bad_input(
    call: Callable[..., object], given: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(**given)
