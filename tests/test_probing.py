"""The probe against arithmetic by hand on stored activations, and the traces it must not leave."""

import copy
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import nn

import svlib as sv
from svlib._random import stream
from svlib.theory import maps


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(y: torch.Tensor, unit: int) -> tuple[float, float]:
    """m^2 over all pairs of different inputs, v^2 = mean square - m^2, in float64."""
    units = y.double().movedim(unit, 1).flatten(2) if y.ndim > 2 else y.double()[..., None]
    means = units.mean(2).numpy()
    pairs = np.mean([means[a] * means[b] for a, b in permutations(range(len(means)), 2)], axis=0).mean()
    return float(pairs), float((units**2).mean()) - float(pairs)


def shifted(model: nn.Module, offset: float) -> nn.Module:
    """Biases that make m/v large."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.constant_(parameter, offset)
    return model


MODELS = {
    "mlp": (sv.networks.mlp(12, width=9, depth=4, outputs=5, seed=0), gaussian(7, 12)),
    "mlp, m/v of 100": (shifted(sv.networks.mlp(12, width=9, depth=2, outputs=5, seed=0), 300.0), gaussian(7, 12)),
    "mlp, BatchNorm": (sv.networks.mlp(12, width=9, depth=4, outputs=5, batchnorm=True, seed=0), gaussian(7, 12)),
    "all-cnn-c": (sv.networks.all_cnn_c(4, seed=0), gaussian(5, 3, 16, 16)),
    "all-cnn-c, BatchNorm": (sv.networks.all_cnn_c(4, batchnorm=True, seed=0), gaussian(5, 3, 16, 16)),
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
        layer.register_forward_hook(lambda _, __, y, name=name: stored.__setitem__(name, y.detach()))
        for name, layer in sv.probing.weighted_layers(model).items()
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
        assert row.v2_fraction == pytest.approx(v2 / (m2 + v2), rel=1e-6)
        assert row.shape == tuple(y.shape[1:])
        assert row.inputs == len(x)


def test_two_common_mistakes_would_be_noticed() -> None:
    """Squaring the variance, or averaging over units instead of inputs, as seen in ports of such tools."""
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
    assert list(table.inputs) == [8, 8]


def test_dead_units_are_counted() -> None:
    model = nn.Conv2d(1, 4, 1)
    with torch.no_grad():
        model.bias.copy_(torch.tensor([-100.0, -100.0, -100.0, 100.0]))  # type: ignore[union-attr]
    assert sv.probe(model, gaussian(3, 1, 5, 5)).dead.iloc[0] == 0.75


def state(model: nn.Module) -> dict[str, object]:
    return {
        "state": copy.deepcopy(model.state_dict()),
        "modes": [module.training for module in model.modules()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "grads": [parameter.grad for parameter in model.parameters()],
        "needs": [parameter.requires_grad for parameter in model.parameters()],
        "generator": torch.get_rng_state(),
    }


def same(before: dict[str, object], after: dict[str, object]) -> None:
    torch.testing.assert_close(before, after, rtol=0, atol=0)


class Failing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("half-way")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_no_trace(training: bool, fails: bool) -> None:
    last: nn.Module = Failing() if fails else nn.Linear(6, 2)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(), last).train(training)
    model[0].weight.requires_grad_(False)
    x = gaussian(9, 4)
    before = state(model)
    calls = [
        lambda: sv.probe(model, x),
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
        (nn.ReLU(), gaussian(3, 4), ValueError, "must have a linear or convolutional layer, got ReLU"),
        (nn.Linear(4, 2), 3, TypeError, "batches must be a tensor or an iterable"),
        (nn.Linear(4, 2), "text", TypeError, "batches must be a tensor or an iterable"),
        (nn.Linear(4, 2), [np.ones((3, 4))], TypeError, "batches must hold tensors"),
        (nn.Linear(4, 2), [], ValueError, "at least 2 inputs, got none"),
        (nn.Linear(4, 2), gaussian(1, 4), ValueError, "at least 2 inputs, got 1"),
        (nn.Linear(4, 2), torch.full((3, 4), torch.nan), ValueError, "batches must be finite, got 12 NaN"),
    ],
)
def test_bad_input(model: nn.Module, batches: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sv.probe(model, batches)


def test_bad_gradients() -> None:
    with pytest.raises(ValueError, match="seed must be at least 0"):
        sv.probe_gradients(nn.Linear(2, 2), gaussian(3, 2), seed=-1)
    with pytest.raises(TypeError, match="inputs must be a tensor, got list"):
        sv.probe_gradients(nn.Linear(2, 2), [1.0], seed=0)  # type: ignore[arg-type]


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


class Flattens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flatten(0, 1))


def test_inputs_must_stay_apart() -> None:
    with pytest.raises(ValueError, match="layer 'layer' must keep the 3 inputs of a batch apart"):
        sv.probe(Flattens(), gaussian(3, 5, 4))
    with pytest.raises(ValueError, match="layer '' must see a batch"):
        sv.probe(nn.Conv2d(1, 2, 3), gaussian(1, 6, 6))
    with pytest.raises(TypeError, match=r"batches must be of the model's torch.float32, got torch.float64"):
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
    with pytest.raises(ValueError, match=r"layer '1\.layer' must be called in the model's forward pass"):
        sv.init.total_(half_idle, gaussian(3, 4))
