"""The probe against arithmetic by hand on stored activations, and the traces it must not leave."""

import copy
import io
import random
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import svlib as sv
from svlib._random import stream
from svlib.probing.batches import as_batches
from svlib.probing.forward import Pass
from svlib.probing.models import weighted_layers
from svlib.probing.rows import Rows
from svlib.probing.trace import Trace
from svlib.theory import maps
from tests import models


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(y: torch.Tensor, unit: int) -> tuple[float, float]:
    """m^2 over all pairs of different inputs, v^2 = mean square - m^2, in float64."""
    units = y.double().movedim(unit, 1).flatten(2) if y.ndim > 2 else y.double()[..., None]
    means = units.mean(2).numpy()
    pairs = np.mean(
        [means[a] * means[b] for a, b in permutations(range(len(means)), 2)], axis=0
    ).mean()
    return float(pairs), float((units**2).mean()) - float(pairs)


def shifted(model: nn.Module, offset: float) -> nn.Module:
    """Biases that make m/v large."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.constant_(parameter, offset)
    return model


MODELS = {
    "mlp": (sv.networks.mlp(12, width=9, depth=4, outputs=5, seed=0), gaussian(7, 12)),
    "mlp, m/v of 100": (
        shifted(sv.networks.mlp(12, width=9, depth=2, outputs=5, seed=0), 300.0),
        gaussian(7, 12),
    ),
    "mlp, BatchNorm": (
        sv.networks.mlp(12, width=9, depth=4, outputs=5, batchnorm=True, seed=0),
        gaussian(7, 12),
    ),
    "all-cnn-c": (sv.networks.all_cnn_c(4, seed=0), gaussian(5, 3, 16, 16)),
    "all-cnn-c, BatchNorm": (
        sv.networks.all_cnn_c(4, batchnorm=True, seed=0),
        gaussian(5, 3, 16, 16),
    ),
    "u-net": (sv.networks.UNet(3, levels=2, seed=0), gaussian(4, 1, 8, 8)),
    "tokens": (nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), gaussian(4, 11, 6)),
    "conv1d": (nn.Sequential(nn.Conv1d(2, 3, 3), nn.ConvTranspose1d(3, 2, 2)), gaussian(4, 2, 9)),
    "conv3d, float64": (nn.Conv3d(1, 2, 2).double(), gaussian(3, 1, 3, 3, 3).double()),
}


@pytest.mark.parametrize("name", MODELS)
def test_equals_arithmetic_by_hand(name: str) -> None:
    model, x = MODELS[name]
    stored: dict[str, torch.Tensor] = {}
    hooks = [
        layer.register_forward_hook(
            lambda _, __, y, name=name: stored.__setitem__(name, y.detach())
        )
        for name, layer in weighted_layers(model).items()
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    table = sv.probe(model, x)
    assert list(table.name) == list(stored)  # execution order
    for row in table.itertuples():
        y = stored[str(row.name)]
        m2, v2 = by_hand(y, y.ndim - 1 if "Linear" in str(row.type) else 1)
        assert row.v2 == pytest.approx(v2, rel=1e-6)
        assert row.m2 == pytest.approx(m2, rel=1e-6, abs=1e-9 * (m2**2 + v2**2) ** 0.5)
        assert row.sigma2 == pytest.approx(m2 + v2, rel=1e-9)
        assert row.fraction == pytest.approx(v2 / (m2 + v2), rel=1e-6)
        assert row.shape == tuple(y.shape[1:])
        assert row.samples == len(x)


def test_two_common_mistakes_would_be_noticed() -> None:
    """The variance squared, or averaged over units instead of inputs, as in ports of such tools."""
    y = gaussian(50, 8) * torch.arange(1, 9) + torch.arange(8)
    model = nn.Linear(8, 8, bias=False)
    nn.init.eye_(model.weight)
    found = float(sv.probe(model, y).v2.iloc[0])
    assert found == pytest.approx(float(y.var(0).mean()), rel=1e-6)
    assert abs(found / float(y.var(0).square().mean()) - 1) > 0.1
    assert abs(found / float(y.var(1).mean()) - 1) > 0.1


def test_batches_of_any_kind_and_size() -> None:
    model, x = MODELS["all-cnn-c"]
    whole = sv.probe(model, x)
    labels = torch.zeros(len(x))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), batch_size=2)
    for batches in (loader, [x[:4], x[4:]], iter([(x[:1], labels[:1]), (x[1:], labels[1:])])):
        np.testing.assert_allclose(sv.probe(model, batches).v2, whole.v2, rtol=1e-5)


def test_a_layer_called_twice_has_two_rows() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.layer(torch.relu(self.layer(x))))

    table = sv.probe(Twice(), [gaussian(3, 4), gaussian(5, 4)])
    assert list(table.name) == ["layer", "layer (2)"]
    assert list(table.samples) == [8, 8]


def test_dead_units_are_counted() -> None:
    model = nn.Conv2d(1, 4, 1)
    with torch.no_grad():
        model.bias.copy_(torch.tensor([-100.0, -100.0, -100.0, 100.0]))  # type: ignore[union-attr]
    assert sv.probe(model, gaussian(3, 1, 5, 5)).dead.iloc[0] == 0.75
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)  # type: ignore[arg-type]
    assert sv.probe(model, gaussian(3, 1, 5, 5)).dead.iloc[0] == 1  # 0 passes nothing either


HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks")]


def state(model: nn.Module) -> dict[str, object]:
    return {
        "python": random.getstate()[1],
        "numpy": np.random.get_state()[1].tolist(),  # type: ignore[index]
        "state": copy.deepcopy(model.state_dict()),
        "modes": [module.training for module in model.modules()],
        "hooks": [[len(getattr(module, kind)) for kind in HOOKS] for module in model.modules()],
        "grads": [parameter.grad for parameter in model.parameters()],
        "needs": [parameter.requires_grad for parameter in model.parameters()],
        "generator": torch.get_rng_state(),
    }


def same(before: dict[str, object], after: dict[str, object]) -> None:
    torch.testing.assert_close(before, after, rtol=0, atol=0)


class Draws(nn.Module):
    """Uses the generators of Python and NumPy."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + random.random() + np.random.random()


class Failing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("half-way")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_no_trace(training: bool, fails: bool) -> None:
    last: nn.Module = Failing() if fails else nn.Linear(6, 2)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(), Draws(), last
    ).train(training)
    model[0].weight.requires_grad_(False)
    x = gaussian(9, 4)
    before = state(model)
    calls = [
        lambda: sv.probe(model, x),
        lambda: sv.probe(model, x, layers="all", positions="units"),
        lambda: sv.probe_gradients(model, x, seed=0),
    ]
    for call in calls:
        if fails:
            with pytest.raises(RuntimeError, match="half-way"):
                call()
        else:
            call()
        same(before, state(model))
    assert not x.requires_grad


def test_gradients_equal_autograd_by_hand() -> None:
    model, x = sv.networks.mlp(5, width=6, depth=3, outputs=4, seed=1), gaussian(3, 5)
    y0 = model[0](x).detach().requires_grad_()
    y1 = model[2](model[1](y0))
    y1.retain_grad()
    y2 = model[4](model[3](y1))
    direction = torch.randn(y2.shape, generator=stream(0, "direction"))
    y2.backward(direction)
    squares = [float((g**2).mean()) for g in (y0.grad, y1.grad, direction) if g is not None]
    table = sv.probe_gradients(model, x, seed=0)
    np.testing.assert_allclose(table.gradient2, np.array(squares) / squares[-1], rtol=1e-5)
    np.testing.assert_allclose(table.growth[:2], np.array(squares[:2]) / squares[1:], rtol=1e-5)


def test_gradients_grow_through_batchnorm_as_predicted() -> None:
    growth = []
    for seed in range(2):
        model = sv.networks.mlp(500, width=500, depth=12, outputs=500, batchnorm=True, seed=seed)
        table = sv.probe_gradients(model, sv.data.gaussian(16, 500, seed=seed), seed=seed)
        growth.append(np.exp(np.log(table.growth[2:10]).mean()))
    assert np.mean(growth) == pytest.approx(maps.batchnorm_gradient_growth(16), rel=0.04)


@pytest.mark.parametrize(
    ("model", "batches", "error", "message"),
    [
        ("model", gaussian(3, 4), TypeError, "model must be a torch.nn.Module, got str"),
        (
            nn.ReLU(),
            gaussian(3, 4),
            ValueError,
            "must have a linear or convolutional layer, got ReLU",
        ),
        (
            nn.LazyLinear(2),
            gaussian(3, 4),
            ValueError,
            "model must have all its parameters, got lazy ones",
        ),
        (nn.Linear(4, 2), 3, TypeError, "batches must be a tensor or an iterable"),
        (nn.Linear(4, 2), {"input": 3}, TypeError, "batches must hold tensors, .* got dict"),
        (
            nn.Linear(4, 2),
            [(3, gaussian(3, 4))],
            TypeError,
            "batches must hold tensors, tuples that start with one",
        ),
        (
            nn.Linear(4, 2),
            torch.tensor(1.0),
            ValueError,
            "batches must have the inputs along their first dimension",
        ),
        (nn.Linear(4, 2), "text", TypeError, "batches must be a tensor or an iterable"),
        (nn.Linear(4, 2), [np.ones((3, 4))], TypeError, "batches must hold tensors"),
        (nn.Linear(4, 2), [], ValueError, "at least 2 inputs, got none"),
        (nn.Linear(4, 2), gaussian(1, 4), ValueError, "at least 2 inputs, got 1"),
        (
            nn.Linear(4, 2),
            torch.full((3, 4), torch.nan),
            ValueError,
            "batches must be finite, got 12 NaN",
        ),
    ],
)
def test_bad_input(model: nn.Module, batches: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sv.probe(model, batches)


def test_masks_may_be_infinite() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return torch.softmax(self.layer(x) + mask, -1)

    mask = torch.tensor([0.0, 0.0, 0.0, -torch.inf]).expand(5, 4)
    batches = [(gaussian(5, 4), mask)] * 2
    assert len(sv.probe(Masked(), batches)) == 1
    with pytest.warns(UserWarning, match="1 outputs have no row because they are not finite: add"):
        assert list(sv.probe(Masked(), batches, layers="all").name) == ["layer", "softmax"]


def test_bad_gradients() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        sv.probe_gradients(3, gaussian(3, 2), seed=0)  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match="model must return a floating-point tensor, got dict with none"
    ):
        sv.probe_gradients(Returns({}), gaussian(3, 2), seed=0)
    with pytest.raises(TypeError, match=r"seed must be an integer, got 0\.5"):
        sv.probe_gradients(nn.Linear(2, 2), gaussian(3, 2), seed=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed must be at least 0"):
        sv.probe_gradients(nn.Linear(2, 2), gaussian(3, 2), seed=-1)
    with pytest.raises(
        TypeError, match="inputs must be one batch: a tensor, tuple or dict, got list"
    ):
        sv.probe_gradients(nn.Linear(2, 2), [1.0], seed=0)


def test_activations_in_place_do_not_change_the_gradients() -> None:
    tables = []
    for inplace in (False, True):
        layers = [nn.Linear(6, 6) for _ in range(3)]
        for seed, layer in enumerate(layers):
            nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(seed))
            layer.requires_grad_(not inplace)  # frozen parameters, too
        model = nn.Sequential(layers[0], nn.ReLU(inplace), layers[1], nn.ReLU(inplace), layers[2])
        for layer in layers:
            nn.init.zeros_(layer.bias)
        tables.append(sv.probe_gradients(model, gaussian(5, 6), seed=0))
    np.testing.assert_allclose(tables[0].gradient2, tables[1].gradient2, rtol=1e-6)


class Returns(nn.Module):
    """Calls a layer and returns something else."""

    def __init__(self, value: object) -> None:
        super().__init__()
        self.layer, self.value = nn.Linear(2, 2), value

    def forward(self, x: torch.Tensor) -> object:
        self.layer(x)
        return self.value


class Flattens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flatten(0, 1))


class Windows(Flattens):
    """Cuts positions into windows, which it counts as inputs, as Swin transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(4, 4), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(super().forward(self.before(x)).unflatten(0, x.shape[:2]))


def test_inputs_merged_with_positions_are_told_apart_again() -> None:
    model, x = Windows(), gaussian(3, 6, 4)
    explanation = sv.explain(model, x)
    assert list(explanation.table.name) == ["before", "layer", "after"]
    with torch.no_grad():
        y = model.layer(model.before(x).flatten(0, 1)).unflatten(0, (3, 6))
    expected = sv.decompose(y, 0, 2, (1,))
    row = explanation.table.iloc[1]
    assert (row.m2, row.v2) == pytest.approx((float(expected.m2), float(expected.v2)))
    assert sv.init.sample_(model, x).done.tolist() == ["set"] * 3
    with torch.no_grad():
        y = model.layer(model.before(x).flatten(0, 1)).unflatten(0, (3, 6))
    np.testing.assert_allclose(sv.decompose(y, 0, 2, (1,)).variance, 1, rtol=1e-4)


def test_inputs_that_are_mixed_have_no_row() -> None:
    order = torch.randperm(18, generator=torch.Generator().manual_seed(0))
    mixed = Holds(lambda self, x: self.layer(x.flatten(0, 1)[order]))
    with pytest.raises(ValueError, match="layer 'layer' must keep the 3 inputs of a batch apart"):
        sv.probe(mixed, gaussian(3, 6, 4))


def test_inputs_must_stay_apart() -> None:
    with pytest.raises(ValueError, match="at least 2 inputs, got 1"):
        sv.probe(nn.Conv2d(1, 2, 3), gaussian(1, 6, 6))
    with pytest.raises(
        TypeError, match=r"batches must be of the model's torch.float32, got torch.float64"
    ):
        sv.probe(nn.Linear(4, 2), gaussian(3, 4).double())


class Replaces(nn.Module):
    """Puts a new tensor in the place of its buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.average: torch.Tensor
        self.register_buffer("average", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        self.average = 0.9 * self.average + y.mean(0)
        return y


def test_replaced_buffers_come_back() -> None:
    model = Replaces()
    buffer = model.average
    sv.probe(model, gaussian(3, 4))
    assert model.average is buffer
    assert not buffer.any()


def test_no_weighted_layer_called() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(ValueError, match="model must call a weighted layer"):
        sv.probe(Idle(), gaussian(3, 4))
    half_idle = nn.Sequential(nn.Linear(4, 4), Idle())
    with pytest.warns(UserWarning, match=r"left as they are: '1\.layer' \(not called\): freeze"):
        assert sv.init.total_(half_idle, gaussian(3, 4)).name.tolist() == ["0"]


def by_hand_of_any(y: np.ndarray, unit: int, positions: str) -> tuple[float, float]:
    """m^2 and v^2 of y (inputs, ...), from the mean over pairs of different inputs, in float64."""
    y = np.moveaxis(y.astype(np.float64), unit, 1)
    y = y.reshape(len(y), -1, 1) if positions == "units" else y.reshape(*y.shape[:2], -1)
    means = y.mean(-1)
    centre = means.mean(0)  # sums of products of what is left lose no digits
    rest = means - centre
    pairs = centre**2 - (rest**2).sum(0) / (len(y) * (len(y) - 1))
    return float(pairs.mean()), float(
        ((y - centre[:, None]) ** 2).mean() + (centre**2).mean() - pairs.mean()
    )


@pytest.mark.parametrize("positions", ["samples", "units"])
@pytest.mark.parametrize("shift", [0, 100], ids=["as it is", "m/v of 100"])
@pytest.mark.parametrize("name", models.MODELS)
def test_any_model_equals_arithmetic_by_hand(name: str, shift: int, positions: str) -> None:
    model, batch = models.MODELS[name]()
    layers = weighted_layers(model)
    if shift:
        v2 = sv.probe(model, batch, positions=positions).set_index("name").v2
        for layer_name, layer in layers.items():
            if layer.bias is not None:
                nn.init.constant_(layer.bias, shift * float(v2[layer_name]) ** 0.5)
        if layers[v2.index[0]].bias is None:
            batch = batch + 1000  # and BatchNorm takes it away again
    stored: list[tuple[np.ndarray, int]] = []

    def store(layer: nn.Module, _: object, y: torch.Tensor) -> None:
        stored.append(
            (
                y.detach().numpy().copy(),
                1 if isinstance(layer, nn.modules.conv._ConvNd) else y.ndim - 1,
            )
        )

    hooks = [layer.register_forward_hook(store) for layer in layers.values()]
    table = sv.probe(model, batch, positions=positions)
    for hook in hooks:
        hook.remove()
    assert len(table) == len(stored) >= 5
    worst = 0.0
    for (y, unit), found_m2, found_v2 in zip(
        stored, table.m2.to_numpy(), table.v2.to_numpy(), strict=True
    ):
        m2, v2_by_hand = by_hand_of_any(y, unit, positions)
        assert found_v2 == pytest.approx(v2_by_hand, rel=1e-6)
        assert found_m2 == pytest.approx(m2, rel=1e-6, abs=1e-6 * (m2 + v2_by_hand))
        worst = max(worst, abs(found_v2 / v2_by_hand - 1))
    if shift and layers[table.name[0]].bias is not None:
        assert table.ratio.max() > 50
    print(
        f"{name}, {len(table)} rows, m/v up to {table.ratio.max():.0f}, {positions}: "
        f"v2 within {worst:.0e}"
    )


class Functional(nn.Module):
    """A model without parameters and modules."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(x @ torch.eye(x.shape[1])) + x
        return F.relu_(y * 2.0).reshape(len(x), -1)


def test_all_rows_of_modules_and_functions() -> None:
    x = gaussian(30, 6)
    table = sv.probe(Functional(), x, layers="all")
    assert list(table.name) == ["matmul", "relu", "add", "mul", "relu (2)"]  # relu_ is one, too
    y = x.relu() + x
    for row, expected in zip(
        table.itertuples(), (x, x.relu(), y, 2 * y, (2 * y).relu()), strict=True
    ):
        assert row.v2 == pytest.approx(float(expected.double().var(0).mean()), rel=1e-6)
    model = models.VGGLike()
    everything = sv.probe(model, gaussian(4, 1, 16, 16), layers="all")
    assert list(everything.type[:4]) == ["Conv2d", "relu", "Conv2d", "relu"]
    assert "max_pool2d" in set(everything.type)
    assert "flatten" not in set(everything.type)  # a view
    weighted = sv.probe(model, gaussian(4, 1, 16, 16))
    np.testing.assert_array_equal(everything[everything.name.isin(weighted.name)].v2, weighted.v2)
    chosen = sv.probe(model, gaussian(4, 1, 16, 16), layers=["hidden.1", "*relu*", nn.Linear])
    assert list(chosen.name) == ["relu", "hidden.1", "relu (2)", "relu (3)", "relu (4)", "scores"]
    for layers, error, message in (
        (
            "relu",
            TypeError,
            "layers must be None, 'all' or a list of names and module types, got 'relu'",
        ),
        ([], TypeError, "layers must hold names"),
        ([3], TypeError, r"layers must hold names .* got \[3\]"),
        (["nothing"], ValueError, "model must call what layers names, got none called"),
    ):
        with pytest.raises(error, match=message):
            sv.probe(model, gaussian(4, 1, 16, 16), layers=layers)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="positions must be one of"):
        sv.probe(model, gaussian(4, 1, 16, 16), positions="pixels")


def test_units_lie_where_they_lay() -> None:
    """ReLU has its units along dimension 1 behind a convolution in one dimension, along the last
    behind a linear layer."""
    y = gaussian(20, 3, 7) * torch.arange(1, 4)[:, None] + torch.arange(3)[:, None]
    for layer in (nn.Conv1d(3, 3, 1, bias=False), nn.Linear(7, 7, bias=False)):
        nn.init.dirac_(layer.weight) if isinstance(layer, nn.Conv1d) else nn.init.eye_(layer.weight)
        table = sv.probe(nn.Sequential(layer, nn.ReLU()), y, layers="all")
        dims = (0, 1, (2,)) if isinstance(layer, nn.Conv1d) else (0, 2, (1,))
        assert table.m2[1] == pytest.approx(float(sv.decompose(y.relu(), *dims).m2), rel=1e-6)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(5, 6)

    def forward(self, a: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> dict[str, object]:
        return {"logits": self.first(a) + self.second(b), "pair": (self.first(a), scale)}


def test_tuples_and_dictionaries_are_arguments() -> None:
    model, a, b = TwoInputs(), gaussian(9, 4), gaussian(9, 5)
    expected = sv.probe(model, {"a": a, "b": b})
    assert list(expected.name) == ["first", "second", "first (2)"]
    labels = torch.zeros(9)
    for batches in (
        [(a, b)],
        [(a, b, labels)],
        [{"b": b, "a": a, "scale": 2.0}],
        [{"a": a[:4], "b": b[:4]}, (a[4:], b[4:])],
    ):
        np.testing.assert_allclose(sv.probe(model, batches).v2, expected.v2, rtol=1e-6)
    names = sv.probe(model, {"a": a, "b": b}, layers="all").name
    assert list(names) == ["first", "second", "add", "first (2)"]
    gradients = sv.probe_gradients(model, (a, b), seed=0)
    assert list(gradients.name) == ["first", "second", "first (2)"]
    assert sv.init.sample_(model, {"a": a, "b": b}).done.tolist()[2].startswith("left, set")


def test_weights_that_are_not_called_are_named() -> None:
    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.warns(
        UserWarning,
        match=r"1 outputs have no row because they were not called as modules: self_attn\.out_proj",
    ):
        table = sv.probe(attention, gaussian(5, 3, 8))
    assert list(table.name) == ["linear1", "linear2"]
    assert (
        "self_attn"
        in sv.probe(attention, gaussian(5, 3, 8), layers=[nn.MultiheadAttention]).name[0]
    )


def test_compiled_models_run_uncompiled() -> None:
    model, x = sv.networks.mlp(8, width=16, depth=3, outputs=2, seed=0), gaussian(20, 8)
    plain = sv.probe(model, x)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend)
    compiled(x)
    count = len(graphs)
    assert count
    pd.testing.assert_frame_equal(sv.probe(compiled, x), plain)  # type: ignore[arg-type]
    assert len(graphs) == count  # nothing was compiled for it
    with sv.Probe(compiled) as probe:  # type: ignore[arg-type]
        compiled(x).sum().backward()
    np.testing.assert_allclose(probe.table.v2, plain.v2, rtol=1e-6)
    assert len(graphs) == count
    torch._dynamo.reset()


def test_autocast_channels_last_and_no_grad() -> None:
    model, x = models.VGGLike(), gaussian(6, 1, 16, 16)
    expected = sv.probe(model, x)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    last = sv.probe(model, x.contiguous(memory_format=torch.channels_last))
    np.testing.assert_allclose(last.v2, expected.v2, rtol=1e-5)
    with torch.no_grad():
        pd.testing.assert_frame_equal(sv.probe(model, x), last)
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_allclose(sv.probe(model, x).v2, expected.v2, rtol=0.05)


def test_probe_in_a_training_loop_changes_nothing() -> None:
    def train(every: int | None) -> tuple[list[float], pd.DataFrame]:
        model = nn.Sequential(
            *sv.networks.mlp(8, width=16, depth=3, outputs=2, batchnorm=True, seed=0),
            nn.Dropout(0.2),
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses, rng = [], torch.get_rng_state()
        with sv.Probe(model, every=every or 1) if every else nullcontext() as probe:
            for step in range(7):
                loss = model(gaussian(20, 8, seed=step)).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                with torch.no_grad():
                    model.eval()(gaussian(20, 8, seed=99))
                model.train()
        assert not any(
            module._forward_hooks or module._forward_pre_hooks for module in model.modules()
        )
        torch.set_rng_state(rng)
        return losses, probe.table if probe else pd.DataFrame()

    plain, _ = train(None)
    losses, table = train(3)
    assert losses == plain
    assert table.step.unique().tolist() == [0, 3, 6]
    assert len(table) == 9
    model = nn.Sequential(
        *sv.networks.mlp(8, width=16, depth=3, outputs=2, batchnorm=True, seed=0), nn.Dropout(0.2)
    )
    first = sv.probe(model, gaussian(20, 8, seed=0))
    np.testing.assert_allclose(table.v2[:3], first.v2, rtol=1e-6)


def test_probe_survives_a_forward_pass_that_raises() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Failing())
    with sv.Probe(model, layers="all") as probe:
        with pytest.raises(RuntimeError, match="half-way"):
            model(gaussian(3, 4))
        assert probe.table.empty
        model[1] = nn.ReLU()
        model(gaussian(3, 4))
        assert list(probe.table.step) == [1, 1]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    first, last = nn.Linear(4, 4), nn.Linear(4, 2)
    diverging = nn.Sequential(first, nn.ReLU(), last)
    with sv.Probe(diverging) as probe:
        diverging(gaussian(3, 4))
        diverging(gaussian(1, 4))  # one input has no variance
        nn.init.constant_(last.bias, torch.nan)
        with pytest.warns(
            UserWarning, match="1 outputs have no row because they are not finite: 2"
        ):
            diverging(gaussian(3, 4))
        nn.init.constant_(first.bias, torch.nan)
        with pytest.warns(
            UserWarning, match="2 outputs have no row because they are not finite: 0, 2"
        ):
            diverging(gaussian(3, 4))
    assert probe.table.step.tolist() == [0, 0, 2]
    for arguments, error, message in (
        ({"every": 0}, ValueError, "every must be at least 1"),
        ({"every": 1.5}, TypeError, "every must be an integer"),
        ({"layers": 3}, TypeError, "layers must be None"),
        ({"positions": "?"}, ValueError, "positions must be one of"),
    ):
        with pytest.raises(error, match=message):
            sv.Probe(model, **arguments)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        sv.Probe(3)  # type: ignore[arg-type]


class Holds(nn.Module):
    """A layer and a function of one's own."""

    def __init__(self, function: Callable[..., Any], **buffers: torch.Tensor | None) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(4, 4), function
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def forward(self, *given: Any, **named: Any) -> Any:
        return self.function(self, *given, **named)


def test_inputs_that_a_model_changes_stay() -> None:
    model, x = Holds(lambda self, x: self.layer(x.mul_(2))), gaussian(9, 4)
    kept = x.clone()
    expected = sv.probe(model, x).v2[0]
    assert sv.probe(model, x).v2[0] == expected
    sv.init.total_(model, x)
    assert torch.equal(x, kept)
    assert sv.probe(model, x).sigma2[0] == pytest.approx(1, rel=1e-5)


def test_buffers_of_every_kind_come_back() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        self.mask, self.wide = torch.ones(3), self.wide + 1
        self.grown.resize_(7)
        self.register_buffer("new", torch.ones(2), persistent=False)
        return self.layer(x) + torch.sparse.mm(self.sparse, x)

    sparse = torch.eye(9).to_sparse()
    model = Holds(
        forward,
        mask=None,
        wide=torch.tensor(torch.nan).expand(3),
        grown=torch.ones(4),
        sparse=sparse,
    )
    own = dict(model._buffers)
    sv.probe(model, gaussian(9, 4))
    assert model._buffers.keys() == own.keys()
    assert all(model._buffers[name] is buffer for name, buffer in own.items())
    assert model.grown.shape == (4,)
    assert not model._non_persistent_buffers_set
    with pytest.raises(
        ValueError, match="model must hold numbers, got parameters or buffers on the meta device"
    ):
        sv.probe(nn.Linear(4, 4, device="meta"), gaussian(9, 4))


def test_padding_and_later_batches_take_the_same_way() -> None:
    """Torch's fast path of transformers goes round layers where it can."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    padding = torch.zeros(5, 3, dtype=torch.bool)
    padding[:, 2] = True
    batch = {"src": gaussian(5, 3, 8), "src_key_padding_mask": padding}
    with pytest.warns(
        UserWarning, match="2 outputs have no row because they were not called as modules"
    ):
        tables = [sv.probe(model, [batch] * count) for count in (1, 2)]
    assert tables[0].name.tolist() == tables[1].name.tolist()
    assert torch.backends.mha.get_fastpath_enabled()


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class WithExtra(nn.Linear):
    """Returns its output and something else, as layers of tensor-parallel libraries do."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return super().forward(x), None


def test_batches_and_outputs_of_odd_kinds() -> None:
    x, mask = gaussian(8, 4), torch.ones(8, 1, dtype=torch.bool)
    linear = nn.Linear(4, 4)
    expected = sv.probe(linear, x).v2[0]
    for batches in ((x, torch.zeros(8)), [({"input": x}, torch.zeros(8))], [[x, torch.zeros(8)]]):
        assert sv.probe(linear, batches).v2[0] == pytest.approx(expected, rel=1e-9)
    masked = Holds(lambda self, mask, x: self.layer(x) * mask)
    assert len(sv.probe(masked, {"mask": mask, "x": x})) == 1
    named = Holds(lambda self, pair: self.layer(pair.first) + pair.second)
    pairs = [{"pair": Pair(x[:4], x[:4])}, {"pair": Pair(x[4:], x[4:])}]
    assert sv.probe(named, pairs).samples.tolist() == [8]
    assert sv.init.total_(named, pairs[0]).done.tolist() == ["set"]
    extra = nn.Sequential(WithExtra(4, 4))
    assert len(sv.probe(extra, x)) == 1
    sv.init.sample_(extra, x)
    assert sv.probe(extra, x).v2[0] == pytest.approx(1, rel=1e-5)
    assert list(sv.probe_gradients(extra, x, seed=0).gradient2) == [1.0]
    both = Holds(lambda self, *xs: self.layer(xs[0] + xs[1]))
    assert sv.probe(both, (x, x)).v2[0] == pytest.approx(
        float(both.layer(2 * x).detach().double().var(0).mean()), rel=1e-5
    )
    with pytest.raises(
        ValueError,
        match=r"layer '' must see a batch \(inputs, features\), its output has shape \(4,\)",
    ):
        sv.probe(linear, list(x))


def test_a_row_may_merge_inputs_in_some_batches_only() -> None:
    model = Holds(lambda self, x: self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1))
    short, long = gaussian(5, 1, 4), gaussian(5, 2, 4, seed=1)
    table = sv.probe(model, [short, long])
    with torch.no_grad():
        expected = sv.Moments(0, 2, (1,)).update(model.layer(short)).update(model.layer(long))
    assert table.v2[0] == pytest.approx(float(expected.result().v2))


def test_all_rows_depend_on_the_inputs_and_can_be_chosen_by_their_names() -> None:
    computed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.ReLU())
    assert sv.probe(computed, gaussian(6, 4), layers="all").name.tolist() == ["0", "1"]
    twice = Holds(lambda self, x: (torch.relu(self.layer(self.layer(x))), 1))
    everything = sv.probe(twice, gaussian(6, 4), layers="all").name.tolist()
    assert everything == ["layer", "layer (2)", "relu"]
    for name, rows in (
        ("layer", everything[:2]),
        ("layer (2)", everything[1:2]),
        ("relu", everything[2:]),
    ):
        assert sv.probe(twice, gaussian(6, 4), layers=[name]).name.tolist() == rows

    def forgiving(self: Any, x: torch.Tensor) -> torch.Tensor:
        with suppress(RuntimeError):
            self.bad(x)
        return torch.relu(self.layer(x))

    model = Holds(forgiving)
    model.bad = Failing()
    assert sv.probe(model, gaussian(6, 4), layers="all").name.tolist() == ["layer", "relu"]
    with pytest.warns(DeprecationWarning, match="torch.jit.script"):
        scripted = nn.Sequential(torch.jit.script(nn.BatchNorm1d(4)), nn.Linear(4, 4))
    kept = copy.deepcopy(scripted.state_dict())
    assert len(sv.probe(scripted, gaussian(6, 4), layers="all"))
    assert sv.probe(scripted, gaussian(6, 4)).name.tolist() == ["1"]
    torch.testing.assert_close(scripted.state_dict(), kept, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("layer", "shape", "unit"),
    [
        (nn.LayerNorm([3, 5, 5]), (3, 5, 5), 1),
        (nn.LayerNorm(5), (3, 5), 2),
        (nn.BatchNorm1d(3), (3, 5), 1),
        (nn.GroupNorm(1, 3), (3, 5), 1),
        (nn.AvgPool1d(1), (3, 5), 1),
    ],
    ids=lambda value: str(value) if isinstance(value, nn.Module) else None,
)
def test_axes_of_layers(layer: nn.Module, shape: tuple[int, ...], unit: int) -> None:
    x = gaussian(8, *shape) * torch.arange(1, 4).reshape(3, *[1] * (len(shape) - 1)) + torch.arange(
        5
    )
    table = sv.probe(nn.Sequential(layer, nn.ReLU()), x, layers="all")
    places = tuple(dim for dim in range(1, x.ndim) if dim != unit)
    with torch.no_grad():
        y = layer(x)
    for row, expected in enumerate((y, y.relu())):
        assert table.m2[row] == pytest.approx(
            float(sv.decompose(expected, 0, unit, places).m2), rel=1e-5
        )


def test_probe_in_a_loop_ends_with_its_context_and_takes_any_call() -> None:
    def interrupted(self: Any, x: torch.Tensor) -> torch.Tensor:
        self.layer(x)
        raise KeyboardInterrupt

    model = Holds(interrupted)
    for layers in (None, "all"):
        with pytest.raises(KeyboardInterrupt), sv.Probe(model, layers=layers) as probe:
            model(gaussian(5, 4))
        assert not any(
            module._forward_hooks or module._forward_pre_hooks for module in model.modules()
        )
        assert torch.overrides._get_current_function_mode() is None
        assert probe.table.empty

    def nothing(self: Any, *given: Any) -> None:
        self.layer(given[-1])

    silent = Holds(nothing)
    names = (name for name in ["layer"])
    with sv.Probe(silent, layers=names) as probe:  # type: ignore[arg-type]
        silent(5, gaussian(5, 4))
        silent(torch.tensor(1.0), gaussian(5, 4))
    assert probe.table.step.tolist() == [0, 1]  # the model returned nothing
    numbers = Holds(lambda self, count: self.layer(torch.ones(count, 4)))
    nothing_found = r"measured nothing: steps with no tensor .* \(1\)"
    with pytest.warns(UserWarning, match=nothing_found), sv.Probe(numbers) as probe:
        numbers(5)
    assert probe.table.empty


def test_probe_says_why_it_measured_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def evaluated() -> None:
        with torch.no_grad():
            model(gaussian(3, 4))

    compiled = torch.compile(model, backend="eager")
    compiled(gaussian(3, 4))
    for step, reason in (
        (lambda: model[0](gaussian(3, 4)), "the model itself was not called: call it as model"),
        (evaluated, r"calls under no_grad, which are not steps \(1\)"),
        (lambda: model(gaussian(1, 4)), r"steps with one input \(1\)"),
    ):
        with pytest.warns(UserWarning, match=f"Probe measured nothing: {reason}"), sv.Probe(model):
            step()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        with sv.Probe(model) as probe:
            compiled(gaussian(3, 4))
    assert len(probe.table) or len(found) == 1
    torch._dynamo.reset()


def test_probe_leaves_out_a_step_that_skips_a_layer() -> None:
    model = Holds(lambda self, x, skips: x if skips else self.layer(x))
    with sv.Probe(model) as probe:
        for skips in (False, True, False):
            model(gaussian(5, 4), skips)
    assert probe.table.step.tolist() == [0, 2]


def test_copies_and_files_of_a_probed_model_do_not_measure() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    stream = io.BytesIO()
    with sv.Probe(model) as probe:
        model(gaussian(5, 4))
        copied = copy.deepcopy(model)
        torch.save(model, stream)
        copied(gaussian(5, 4))
        for hook in model._forward_pre_hooks.values():  # what a file has in its place
            replacement: Any = copy.copy(hook)  # as a pickle would make it
            assert replacement is not hook
            assert replacement(model, (gaussian(5, 4),), {}) is None
    assert b"svlib" not in stream.getvalue()  # nor does it need this library
    torch.testing.assert_close(copied(gaussian(5, 4)), model(gaussian(5, 4)))
    assert probe.table.step.tolist() == [0]


def test_probe_logs_every_step_and_outlives_a_log_that_fails() -> None:
    logged: list[tuple[int, dict[str, float]]] = []
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    log = lambda *given: logged.append(given)  # noqa: E731
    with sv.Probe(model, every=2, maximum=True, log=log) as probe:
        for step in range(3):
            y = model(gaussian(5, 4, seed=step))
    assert y.shape == (5, 4)
    assert [step for step, _ in logged] == [0, 2]
    row = probe.table.iloc[1]
    assert logged[1][1]["fraction/0"] == row.fraction
    assert row.maximum == pytest.approx(
        float(model[0](gaussian(5, 4, seed=2)).detach().abs().max())
    )

    def fails(step: int, values: dict[str, float]) -> None:
        raise OSError("disk full")

    full = "could not log step 0: OSError: disk full"
    with pytest.warns(UserWarning, match=full), sv.Probe(model, log=fails) as probe:
        model(gaussian(5, 4))
    assert len(probe.table) == 1
    with pytest.raises(TypeError, match="log must be a function of step and values, got int"):
        sv.Probe(model, log=3)  # type: ignore[arg-type]


def test_generators_are_as_before_where_the_loader_draws() -> None:
    class Draw(torch.utils.data.Dataset[torch.Tensor]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.full(
                (4,), random.random() + float(np.random.random()) + index
            ) + torch.randn(4)

    loader = torch.utils.data.DataLoader(Draw(), batch_size=4, shuffle=True)
    model = nn.Linear(4, 4)
    for call in (sv.probe, sv.init.total_, sv.init.sample_):
        before = {
            name: value
            for name, value in state(model).items()
            if name in ("python", "numpy", "generator")
        }
        call(model, loader)
        after = {name: value for name, value in state(model).items() if name in before}
        same(before, after)


def test_other_modes_see_the_model_only() -> None:
    class Counts(torch.overrides.TorchFunctionMode):
        calls = 0

        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.calls += 1
            return function(*args, **(kwargs or {}))

    model, x = Holds(lambda self, x: torch.relu(self.layer(x)) / 2.0), gaussian(5, 4)
    with Counts() as plain:
        model(x)
    with Counts() as probed:
        for batch in as_batches(model, x):
            args = batch.args
        before = probed.calls
        trace = Trace(model, (args, {}), 5)
        with Pass(model, Rows("all", "samples"), 5, trace=trace).watch():
            model(*args)
        assert probed.calls - before <= plain.calls + 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["MLP", "ALL-CNN-C", "GPT-2 (transformers)"])
def test_on_a_gpu_as_on_the_processor(name: str) -> None:
    model, batch = models.MODELS[name]()
    expected = sv.probe(model, batch)
    moved = model.cuda()
    before = torch.cuda.get_rng_state()
    found = sv.probe(moved, batch)  # batches are moved
    np.testing.assert_allclose(found.v2, expected.v2, rtol=1e-3)
    assert torch.equal(before, torch.cuda.get_rng_state())
    table = sv.init.sample_(moved, batch)
    np.testing.assert_allclose(table.v2_after[table.done == "set"], 1, rtol=2e-3)
    with torch.autocast("cuda", torch.bfloat16):
        assert len(sv.probe(moved, batch)) == len(expected)
