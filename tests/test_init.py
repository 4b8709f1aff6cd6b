"""Total init and sample init: what they promise, and that a failure leaves the model as it was."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import svlib as sv
from tests import models
from tests.models import wide
from tests.test_probing import gaussian, same, state

MODELS = {
    "mlp": lambda: (
        sv.networks.mlp(20, width=30, depth=5, outputs=3, seed=0),
        gaussian(200, 20),
        gaussian(200, 20, seed=1),
    ),
    "all-cnn-c": lambda: (sv.networks.all_cnn_c(6, channels=1, seed=0), *digits()),
    "u-net": lambda: (
        sv.networks.UNet(4, levels=2, seed=0),
        gaussian(32, 1, 16, 16),
        gaussian(32, 1, 16, 16, seed=1),
    ),
    "defaults of torch, float64": lambda: (
        nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 4)).double(),
        gaussian(200, 20).double(),
        gaussian(200, 20, seed=1).double(),
    ),
}


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    split = sv.data.digits()
    return split.images[:200], split.held_out_images[:200]


@pytest.mark.parametrize("name", MODELS)
def test_total(name: str) -> None:
    model, x, _ = MODELS[name]()
    table = sv.init.total_(model, x)
    probed = sv.probe(model, x)
    np.testing.assert_allclose(probed.sigma2, 1, rtol=1e-4)  # the last layer included
    np.testing.assert_allclose(table.m2_after + table.v2_after, 1, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_sample(name: str) -> None:
    model, x, fresh = MODELS[name]()
    before = sv.probe(model, x)
    table = sv.init.sample_(model, x)
    np.testing.assert_allclose(table.v2_before, before.v2, rtol=1e-6)
    with torch.no_grad():
        y = model(x)
    dims = [0, *range(2, y.ndim)]
    if name != "all-cnn-c":  # its output is the mean over positions of the last layer's
        assert float(y.mean(dims).abs().max()) < 1e-4
        assert float(y.double().var(dims).sub(1).abs().max()) < 5e-3
    np.testing.assert_allclose(table.v2_after, 1, rtol=1e-4)
    assert (table.m2_after.abs() < 0.02).all()  # -v^2/S plus what positions share
    assert sv.probe(model, fresh).fraction.min() > 0.85


def test_total_keeps_the_shape_of_a_function_and_the_relation_of_units() -> None:
    layer = nn.Linear(6, 4)
    original = copy.deepcopy(layer)
    sv.init.total_(layer, gaussian(50, 6))
    ratio = (layer.weight / original.weight).detach()
    torch.testing.assert_close(ratio, torch.full_like(ratio, float(ratio[0, 0])))


def test_one_calibration_batch() -> None:
    x = gaussian(40, 20)
    one, first = MODELS["mlp"]()[0], MODELS["mlp"]()[0]
    sv.init.sample_(one, x[:30])
    sv.init.sample_(first, iter([(x[:30], None), (x[30:], None)]))
    torch.testing.assert_close(one.state_dict(), first.state_dict())
    with pytest.raises(ValueError, match="one calibration batch, got a list of 2: join them"):
        sv.init.sample_(one, [x[:7], x[7:]])


def test_idempotent() -> None:
    model, x, _ = MODELS["all-cnn-c"]()
    sv.init.sample_(model, x)
    once = copy.deepcopy(model.state_dict())
    sv.init.sample_(model, x)
    torch.testing.assert_close(model.state_dict(), once, rtol=1e-3, atol=1e-3)


class Shared(nn.Module):
    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        if tied:
            self.second.weight = self.first.weight
        self.tied = tied

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x) if self.tied else self.second(self.first(x)))


class FailsTheSecondTime(nn.Module):
    """Raises after the layers before it have been changed."""

    calls = iter([1, 2])  # of the class: attributes of the module are restored after every pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) == 10 and next(self.calls) == 2:  # the whole batch
            raise RuntimeError("half-way")
        return x


@pytest.mark.parametrize(
    ("model", "initializer", "error", "message"),
    [
        (
            nn.Sequential(nn.Linear(4, 4), FailsTheSecondTime()),
            sv.init.sample_,
            RuntimeError,
            "half-way",
        ),
        (
            nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
            sv.init.total_,
            ValueError,
            "must have a layer to set, got '': weight made by SpectralNorm",
        ),
    ],
    ids=["raises", "parametrized"],
)
def test_failure_leaves_the_model_as_it_was(
    model: nn.Module, initializer: object, error: type[Exception], message: str
) -> None:
    before = state(model)
    with pytest.raises(error, match=message):
        initializer(model, gaussian(10, 4))  # type: ignore[operator]
    same(before, state(model))


def test_no_trace_but_the_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 2))
    before = state(model)
    sv.init.sample_(model, gaussian(30, 4))
    after = state(model)
    weights = {"0.weight", "0.bias", "3.weight", "3.bias"}
    old: Any = before["state"]
    now = model.state_dict()
    changed = {name for name, value in now.items() if not torch.equal(old[name], value)}
    assert changed == weights
    before.pop("state"), after.pop("state")
    same(before, after)


@pytest.mark.parametrize("initializer", [sv.init.total_, sv.init.sample_])
def test_bad_input(initializer: object) -> None:
    for batches, error, message in (
        (gaussian(1, 4), ValueError, "at least 2 inputs, got 1"),
        ([], ValueError, "at least 2 inputs, got 0"),
        (3, TypeError, "batches must be a tensor"),
        (torch.full((3, 4), torch.inf), ValueError, "must be finite"),
    ):
        with pytest.raises(error, match=message):
            initializer(nn.Linear(4, 2), batches)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"gradients must be one of \[True, False\], got 'yes'"):
        initializer(nn.Linear(4, 2), gaussian(3, 4), gradients="yes")  # type: ignore[operator]
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        initializer(3, gaussian(3, 4))  # type: ignore[operator]


def test_what_is_left_is_said() -> None:
    x = gaussian(40, 4)
    twice, tied = Shared(tied=False), Shared(tied=True)
    assert sv.init.sample_(twice, x).done.tolist() == ["set", "set", "left, set as 'second'"]
    assert sv.init.sample_(tied, x).done.tolist() == ["set", "left, set as 'first'"]
    frozen = nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 2)
    )
    frozen[0].bias.requires_grad_(False)
    before = copy.deepcopy(frozen[0].state_dict())
    table = sv.init.sample_(frozen, x)
    assert table.done.tolist() == ["left, frozen", "deviation set; no bias, mean left", "set"]
    torch.testing.assert_close(frozen[0].state_dict(), before, rtol=0, atol=0)
    assert table.v2_after[1] == pytest.approx(1, rel=1e-4)
    assert table.m2_after[1] > 0.1
    assert sv.init.total_(frozen, x).done.tolist() == ["left, frozen", "set", "set"]
    model: Any
    model, batch = models.MODELS["GPT-2 (transformers)"]()
    embedding = model.transformer.wte.weight.detach().clone()
    assert sv.init.sample_(model, batch).done.iloc[-1] == "left, tied to transformer.wte"
    assert torch.equal(embedding, model.transformer.wte.weight)


def test_what_cannot_be_set_is_left_with_one_warning() -> None:
    orthogonal = nn.utils.parametrizations.orthogonal(nn.Linear(5, 5))
    model = nn.Sequential(nn.Linear(4, 5), orthogonal, nn.ReLU(), nn.Linear(5, 3), nn.Linear(3, 2))
    for parameter in model[3].parameters():
        nn.init.zeros_(parameter)
    before = copy.deepcopy(orthogonal.state_dict())
    with pytest.warns(UserWarning, match="left as they are") as found:
        table = sv.init.sample_(model, gaussian(20, 4))
    assert [str(x.message) for x in found] == [
        "left as they are: '1' (weight made by Orthogonal); '3' (output 0 for every input); "
        "'4' (no variation over inputs): freeze them to leave them silently"
    ]
    assert table.done.str.startswith("left").tolist() == [False, True, True, True]
    torch.testing.assert_close(orthogonal.state_dict(), before, rtol=0, atol=0)
    for layer in list(model)[1:]:
        layer.requires_grad_(False)
    assert sv.init.sample_(model, gaussian(20, 4)).done.tolist() == ["set", *["left, frozen"] * 3]


def test_units_that_do_not_vary_are_left() -> None:
    layer, x = nn.Linear(4, 5), gaussian(20, 4)
    with torch.no_grad():
        layer.weight[2] = 0
    with pytest.warns(UserWarning, match=r"' units 2' \(no variation over inputs\)"):
        table = sv.init.sample_(layer, x)
    assert table.done.tolist() == ["set but for 1 units without variation"]
    with torch.no_grad():
        variance = layer(x).double().var(0).numpy()
    np.testing.assert_allclose(variance, [1, 1, 0, 1, 1], rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("initializer", [sv.init.total_, sv.init.sample_])
@pytest.mark.parametrize(
    "norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm], ids=["old", "new"]
)
def test_weight_normalization(norm: Any, initializer: Any) -> None:
    model: Any = nn.Sequential(
        norm(nn.Conv1d(4, 6, 3)), nn.ReLU(), nn.Flatten(), norm(nn.Linear(18, 5)), nn.ReLU()
    )
    x = gaussian(50, 4, 5)
    directions = [layer.weight.detach() / layer.weight.norm() for layer in (model[0], model[3])]
    table = initializer(model, x)
    assert set(table.done) == {"set"}
    with torch.no_grad():
        y = model[0](x).double()
        z = model[3](model[2](torch.relu(model[0](x)))).double()
    if initializer is sv.init.total_:
        assert float(y.square().mean()) == pytest.approx(1, rel=1e-4)
        assert float(z.square().mean()) == pytest.approx(1, rel=1e-4)
        for layer, old in zip((model[0], model[3]), directions, strict=True):
            torch.testing.assert_close(layer.weight.detach() / layer.weight.norm(), old)
    else:
        np.testing.assert_allclose(z.var(0), 1, rtol=1e-4)
        assert float(z.mean(0).abs().max()) < 1e-5
        assert float(y.mean((0, 2)).abs().max()) < 1e-5


def test_a_length_for_several_units_is_left_by_sample_init() -> None:
    def made() -> nn.Module:
        layer = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3, padding=1), dim=2)
        return nn.Sequential(layer, nn.Conv1d(6, 6, 1))

    x = gaussian(20, 4, 5)
    with pytest.warns(UserWarning, match=r"left as they are: '0' \(one scale for several units\)"):
        assert sv.init.sample_(made(), x).done.tolist()[1] == "set"
    assert sv.init.total_(made(), x).done.tolist() == ["set", "set"]


@pytest.mark.parametrize("initializer", [sv.init.total_, sv.init.sample_])
def test_padding_does_not_count(initializer: Any) -> None:
    def made() -> nn.Module:
        return Tokens(nn.Linear(4, 8), nn.Linear(8, 3))

    x = gaussian(60, 6, 4)
    mask = torch.ones(60, 6, dtype=torch.int64)
    mask[30:, 2:] = 0
    batch = {"x": torch.where(mask[..., None] == 1, x, 9.0), "attention_mask": mask}
    model = made()
    table = initializer(model, batch, mask="attention_mask")
    assert set(table.done) == {"set"}
    with torch.no_grad():
        outputs = [model(x[:30], None).double(), model(x[30:, :2], None).double()]
    mean = torch.cat([y.mean(1) for y in outputs]).mean(0)
    square = torch.cat([y.square().mean(1) for y in outputs]).mean(0)
    if initializer is sv.init.sample_:
        assert float(mean.abs().max()) < 1e-5
        assert float(square.mean()) == pytest.approx(1, rel=0.02)  # m^2 is of pairs of inputs
    else:
        assert float(square.mean()) == pytest.approx(1, rel=1e-5)
    assert table.v2_after.iloc[-1] + table.m2_after.iloc[-1] == pytest.approx(float(square.mean()))


class Tokens(nn.Module):
    """Two layers on every token."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.first, self.second = layers

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        y: torch.Tensor = self.second(torch.relu(self.first(x)))
        return y


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 8, 3, groups=2, padding=1),
        nn.Conv3d(4, 6, 1),
        nn.ConvTranspose1d(4, 6, 3, groups=2, stride=2),
        nn.ConvTranspose2d(4, 8, 2, groups=4),
    ],
    ids=lambda layer: f"{type(layer).__name__}, {layer.groups} groups",
)
def test_every_unit_of_a_layer_of_any_kind(layer: nn.modules.conv._ConvNd) -> None:
    positions = layer.weight.ndim - 2
    x = gaussian(30, 4, *[5] * positions) * torch.arange(1, 5).reshape(4, *[1] * positions) + 1
    sv.init.sample_(layer, x)
    with torch.no_grad():
        y = layer(x).double()
    places = tuple(range(2, y.ndim))
    assert float(y.mean((0, *places)).abs().max()) < 1e-5
    np.testing.assert_allclose(sv.decompose(y, 0, 1, places).variance, 1, rtol=1e-4)


@pytest.mark.parametrize("name", models.MODELS)
def test_any_model_is_repaired(name: str) -> None:
    for initializer in (sv.init.total_, sv.init.sample_):
        model, batch = models.MODELS[name]()
        before = state(model)
        table = initializer(model, batch)
        done = table[table.done.str.startswith(("set", "deviation"))]
        assert len(done) >= len(table) - 1  # GPT-2's last is tied
        values = done.m2_after + done.v2_after if initializer is sv.init.total_ else done.v2_after
        np.testing.assert_allclose(values, 1, rtol=2e-3)
        after = state(model)
        before.pop("state"), after.pop("state")
        same(before, after)
        once = copy.deepcopy(model.state_dict())
        initializer(model, batch)
        torch.testing.assert_close(model.state_dict(), once, rtol=1e-2, atol=1e-2)


def test_layers_without_bias_that_keep_their_means_are_named() -> None:
    x = gaussian(300, 50)
    bare = wide(*(layer for _ in range(9) for layer in (nn.Linear(50, 50, bias=False), nn.ReLU())))
    with pytest.warns(UserWarning, match=r"[2-8] layers without a bias keep .*: give them a bias"):
        table = sv.init.sample_(bare, x)
    assert table.ratio_after.iloc[-1] > 1
    for layer in list(bare)[::2]:
        layer.bias = nn.Parameter(torch.zeros(50))
    assert (
        sv.init.sample_(bare, x).ratio_after.max() == 0
    )  # no warning, as warnings are errors here
    normalized = nn.Sequential(
        *(
            part
            for _ in range(9)
            for part in (nn.Linear(50, 50, bias=False), nn.BatchNorm1d(50), nn.ReLU())
        )
    )
    assert sv.init.sample_(normalized, x).ratio_after.max() < 1


def test_gradients_on_request_and_a_warning_where_they_will_grow() -> None:
    model, x = sv.networks.mlp(64, width=64, depth=20, outputs=10, seed=0), gaussian(300, 64)
    with pytest.warns(UserWarning, match=r"squared gradients now grow 8e\+02 times backwards"):
        table = sv.init.sample_(model, x, gradients=True)
    growth = float(table.gradient2_after[3] / table.gradient2_after[15]) ** (1 / 12)
    assert growth == pytest.approx(np.pi / (np.pi - 1), rel=0.1)
    assert float(table.gradient2_before[3] / table.gradient2_before[15]) ** (1 / 12) < 1.2
    residual, batch = models.MODELS["residual"]()
    sv.init.sample_(residual, batch)  # its shortest way has no ReLU: no warning


def test_compiled_models_are_set() -> None:
    x = gaussian(200, 20)
    compiled = torch.compile(
        sv.networks.mlp(20, width=30, depth=3, outputs=3, seed=0), backend="eager"
    )
    compiled(x)
    part = nn.Sequential(nn.Linear(20, 20), torch.compile(nn.Linear(20, 20), backend="eager"))  # type: ignore[call-overload]
    for model in (compiled, part):
        table = sv.init.sample_(model, x)  # type: ignore[arg-type]
        assert set(table.done) == {"set"}
        np.testing.assert_allclose(table.v2_after, 1, rtol=1e-4)
    torch._dynamo.reset()


def test_autocast_keeps_no_weights_of_before() -> None:
    model, x = sv.networks.mlp(20, width=30, depth=3, outputs=3, seed=0), 30 * gaussian(200, 20)
    with torch.autocast("cpu", torch.bfloat16):
        table = sv.init.total_(model, x)
        with torch.no_grad():
            within = model(x)
    np.testing.assert_allclose(table.m2_after + table.v2_after, 1, rtol=0.02)
    assert float(within.float().square().mean()) == pytest.approx(1, rel=0.05)


class Standardized(nn.Linear):
    """Computes with its weight before it uses it, as weight standardization does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight / self.weight.std(), self.bias)


def test_a_layer_that_makes_its_weight_is_left() -> None:
    for initializer in (sv.init.total_, sv.init.sample_):
        model = nn.Sequential(Standardized(4, 4), nn.Linear(4, 4))
        before = copy.deepcopy(model[0].state_dict())
        with pytest.warns(UserWarning, match=r"'0' \(its weight is not used as it is"):
            table = initializer(model, 3 * gaussian(50, 4))
        assert [done.split(",")[0] for done in table.done] == ["left", "set"]
        assert table.m2_after[1] + table.v2_after[1] == pytest.approx(1, rel=0.05)
        torch.testing.assert_close(model[0].state_dict(), before, rtol=0, atol=0)


def test_shared_biases_and_storage_are_set_once() -> None:
    shared = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    shared[2].bias = shared[0].bias
    assert sv.init.sample_(shared, gaussian(50, 4)).done.tolist() == ["set", "left, set as '0'"]
    storage = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    storage[2].weight.data = storage[0].weight.data
    assert sv.init.total_(storage, gaussian(50, 4)).done.tolist() == ["set", "left, set as '0'"]


def test_models_that_torch_would_speed_up_past_their_layers() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    model.self_attn.requires_grad_(False)
    padding = torch.zeros(5, 3, dtype=torch.bool)
    padding[:, 2] = True
    table = sv.init.sample_(
        model, {"src": gaussian(5, 3, 8), "src_key_padding_mask": padding}, gradients=True
    )
    assert table.done.tolist() == ["set", "set"]
