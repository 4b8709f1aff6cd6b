"""Batches of every form, the axis along which their inputs lie, and what a pass leaves behind."""

import copy
from collections import UserDict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import svlib as sv
from tests.test_probing import by_hand, by_hand_of_any, gaussian


class Net(nn.Module):
    """A module whose forward pass is a function of itself and its arguments."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


class One(Net):
    """The same, of one argument."""

    def forward(self, x: Any) -> Any:
        return self.function(self, x)


def linear(inputs: int = 8, outputs: int = 5) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(inputs))
    return layer


@dataclass
class Record:
    name: str
    features: torch.Tensor


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class Graph:
    """Nodes and edges as graph libraries hold them: neither a mapping nor a dataclass."""

    def __init__(self, x: torch.Tensor, edges: torch.Tensor) -> None:
        self.edges, self.store = edges, {"x": x}

    def keys(self) -> list[str]:
        return list(self.store)

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.store[key]


def v2_of(y: torch.Tensor) -> float:
    return by_hand(y.detach(), y.ndim - 1)[1]


X = gaussian(30, 8)
EDGES = torch.randint(30, (2, 90), generator=torch.Generator().manual_seed(0))


def spelled(words: list[str]) -> torch.Tensor:
    return torch.stack([X[ord(word) - ord("a")] for word in words])


CALLED: dict[str, tuple[Any, Callable[[Any, Any], Any], int | None]] = {
    "dataclass": (Record("a", X), lambda model, batch: model(batch.features), None),
    "mapping": (UserDict(x=X), lambda model, batch: model(batch["x"]), None),
    "named tuple": (Pair(X, X), lambda model, batch: model(batch.second), None),
    "list as one argument": ([list(X)], lambda model, batch: model(torch.stack(batch)), 30),
    "graph": ([Graph(X, EDGES)], lambda model, batch: model(batch["x"]), 30),
    "words": ([list("abcdef")], lambda model, batch: model(spelled(batch)), 6),
    "sparse": (X.to_sparse(), lambda model, batch: model(batch.to_dense()), None),
}


@pytest.mark.parametrize("name", CALLED)
def test_a_function_calls_the_model(name: str) -> None:
    batches, call, inputs = CALLED[name]
    layer = linear()
    samples = inputs or 30
    table = sv.probe(layer, batches, call=call, inputs=inputs)
    assert table.samples.tolist() == [samples]
    assert table.v2[0] == pytest.approx(v2_of(layer(X[:samples])), rel=1e-6)
    found = sv.explain(layer, batches, call=call, inputs=inputs)
    assert len(found.table) == 1
    growth = sv.probe_gradients(
        layer, batches[0] if isinstance(batches, list) else batches, seed=0, call=call
    )
    assert growth.gradient2.tolist() == [1.0]
    if name != "words":  # too few for five units
        done = sv.init.sample_(layer, batches, call=call, inputs=inputs, gradients=True)
        assert done.v2_after[0] == pytest.approx(1, rel=1e-4)


def test_a_function_gets_a_copy() -> None:
    def call(model: nn.Module, batch: Record) -> Any:
        batch.name = "changed"
        return model(batch.features.mul_(2))

    record = Record("a", X.clone())
    sv.probe(linear(), [record], call=call)
    assert record.name == "a"
    assert torch.equal(record.features, X)


def test_a_loop_over_time_steps_has_rows_by_step() -> None:
    cell, x = nn.RNNCell(8, 6), gaussian(20, 3, 8)

    def run(model: nn.Module, batch: torch.Tensor) -> Any:
        state = torch.zeros(len(batch), 6)
        for step in range(batch.shape[1]):
            state = model(batch[:, step], state)
        return state

    table = sv.probe(cell, x, layers="all", call=run)
    assert table.name.tolist() == ["", " (2)", " (3)"]
    assert table.v2.iloc[-1] == pytest.approx(v2_of(run(cell, x)), rel=1e-6)


def test_the_number_of_inputs_can_be_given() -> None:
    images = list(gaussian(8, 3, 6, 6))
    model = One(lambda self, x: self.layer(torch.stack(x)), layer=nn.Conv2d(3, 4, 3))
    expected = by_hand(model.layer(torch.stack(images)).detach(), 1)[1]
    table = sv.probe(model, [(images,)], inputs=8)
    assert table.samples[0] == 8
    assert table.v2[0] == pytest.approx(expected, rel=1e-6)
    assert len(sv.probe(model, [(images,)], inputs=8, layers="all")) == 2
    graph = Net(lambda self, edges, x: self.layer(x[edges[0]][:30]), layer=linear())
    assert sv.probe(graph, (EDGES, X), inputs=30).samples[0] == 30
    with pytest.raises(ValueError, match=r"a list of 8 tensors alike .* \[\(items,\)\]"):
        sv.probe(model, [images], inputs=8)
    with pytest.raises(ValueError, match="inputs must be at least 1"):
        sv.probe(linear(), X, inputs=0)
    with pytest.raises(TypeError, match="call must be a function of model and batch"):
        sv.probe(linear(), X, call=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"give inputs=, .*\(got list\)"):
        sv.probe(linear(), [["a"]], call=lambda model, batch: model(X))
    with pytest.raises(TypeError, match="a function call= of model and batch takes any"):
        sv.probe(linear(), [Record("a", X)])


def test_chunks_of_a_tensor_are_not_arguments() -> None:
    layer = linear()
    for chunks in (X.split(15), X.split(20)):  # the last is shorter
        for use in (sv.probe, sv.explain, sv.init.sample_):
            with pytest.raises(ValueError, match=r"give list\(batches\) for several batches"):
                use(layer, chunks)
        assert sv.probe(layer, list(chunks)).samples[0] == 30
    labelled = [(X, torch.zeros(30)), (X, torch.zeros(30).long()), (X, X.double())]
    for batch in labelled:
        assert sv.probe(layer, batch).samples[0] == 30
    assert sv.probe(layer, [(X, X)]).samples[0] == 30  # of a loader: an input and its target


def test_arguments_without_dimensions_are_passed_on() -> None:
    model = Net(lambda self, t, x: self.layer(x * t), layer=linear())
    for batch in ({"t": torch.tensor(2.0), "x": X}, (torch.tensor(2.0), X)):
        table = sv.probe(model, batch, layers="all")
        assert table.v2.iloc[-1] == pytest.approx(v2_of(model.layer(2 * X)), rel=1e-6)


def test_the_model_decides_on_types() -> None:
    casting = One(lambda self, x: self.layer(x.bfloat16()), layer=linear().bfloat16())
    assert len(sv.probe(casting, X)) == 1
    with pytest.raises(
        TypeError, match=r"^batches must be of the model's torch.bfloat16, got torch.float32.*\)$"
    ):
        sv.probe(linear().bfloat16(), X)
    with pytest.raises(TypeError, match=r"model's torch.float32, got torch.float64"):
        sv.init.total_(nn.Conv1d(3, 2, 1), gaussian(4, 3, 8).double())


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
def test_sparse_and_nested_inputs_are_refused_in_one_line() -> None:
    kinds = [
        X.to_sparse(),
        X.to_sparse_csr(),
        torch.nested.as_nested_tensor(list(X)),
        torch.nested.nested_tensor(list(X), layout=torch.jagged),
    ]
    for x in kinds:
        with pytest.raises(TypeError, match=r"^batches must hold dense tensors, got .*call=$"):
            sv.probe(linear(), x)
    nested = torch.nested.nested_tensor(list(X))
    padded = sv.probe(linear(), nested, call=lambda model, x: model(x.to_padded_tensor(0.0)))
    assert padded.samples[0] == 30
    graph = Net(lambda self, x, a: self.layer(a @ x), layer=linear())
    adjacency = torch.eye(30).to_sparse()
    assert sv.probe(graph, (X, adjacency)).samples[0] == 30


class Spiking(nn.Module):
    """Holds a membrane and other state in plain attributes."""

    def __init__(self, error: type[BaseException] | None = None) -> None:
        super().__init__()
        self.layer, self.error = linear(), error
        self.mem, self.written = torch.zeros(1), torch.zeros(5)
        self.cache: dict[str, Any] = {"keys": [torch.ones(2)], "old": (torch.zeros(3),)}
        self.steps, self.nothing = 0, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x)
        self.mem, self.steps, self.new = 0.9 * self.mem + y, self.steps + 1, y
        self.written += y.mean(0)
        self.cache["keys"].append(y)
        self.cache["old"][0].add_(1)
        self.cache["more"] = y
        if self.error is not None:
            raise self.error("half-way")
        return self.mem


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_plain_attributes_come_back(error: type[BaseException] | None) -> None:
    model = Spiking(error)
    before, kept = dict(vars(model)), copy.deepcopy(vars(model))
    for use in (sv.probe, sv.explain, sv.init.total_):
        with nullcontext() if error is None else pytest.raises(error):
            use(model, X)
        after = vars(model)
        assert after.keys() == before.keys()
        assert [name for name in before if after[name] is not before[name]] == []
        for name in ("mem", "written", "cache", "steps", "nothing"):
            torch.testing.assert_close(after[name], kept[name], rtol=0, atol=0)


def test_state_of_a_model_does_not_change_what_init_sees() -> None:
    model = Spiking()
    assert sv.init.sample_(model, X).v2_after[0] == pytest.approx(1, rel=1e-4)
    model(X[:7])  # would fail with a membrane of 30 inputs


def forces(model: Any, x: torch.Tensor) -> torch.Tensor:
    energy = model.last(torch.tanh(model.layer(model.count(x.requires_grad_()))))
    return torch.autograd.grad(energy.sum(), x, create_graph=True)[0]


class Counts(nn.Module):
    """Counts its calls in a buffer."""

    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        assert self.calls == 1
        return x


@pytest.mark.parametrize("layers", [None, "all"])
def test_models_that_differentiate(layers: str | None) -> None:
    model = One(forces, count=Counts(), layer=linear(), last=linear(5, 3))
    table = sv.explain(model, X, layers=layers).table.set_index("name")
    y = model.layer(X)
    assert table.samples["layer"] == 30
    assert table.v2["layer"] == pytest.approx(v2_of(y), rel=1e-6)
    assert table.v2["last"] == pytest.approx(v2_of(model.last(torch.tanh(y))), rel=1e-6)
    assert not X.requires_grad


def test_parameters_get_no_gradient() -> None:
    def trained(model: Any, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = model.layer(x)
        with torch.enable_grad():
            y.square().mean().backward()
        return y

    model = One(trained, layer=linear())
    held = model.layer.bias.grad = torch.ones(5)
    sv.probe(model, X)
    assert model.layer.weight.grad is None
    assert model.layer.bias.grad is held
    assert (held == 1).all()
    failing = One(lambda model, x: torch.linalg.cholesky(model.layer(x)), layer=linear())
    with pytest.raises(RuntimeError, match="square"):
        sv.probe(failing, X)


def along_time(layer: nn.Module) -> nn.Module:
    return One(lambda self, x: self.layer(x.transpose(0, 1)).transpose(0, 1), layer=layer)


SEQUENCES = torch.linspace(-3, 3, 20)[None, :, None] + 0.1 * gaussian(20, 20, 4)
INNER: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "transpose": lambda self, x: self.layer(x.transpose(0, 1)).transpose(0, 1),
    "permute": lambda self, x: self.layer(x.permute(1, 0, 2)),
    "mT": lambda self, x: self.layer(x.permute(2, 0, 1).mT.movedim(0, 2)),
    "einsum": lambda self, x: self.layer(torch.einsum("btf->tbf", x)),
    "merged": lambda self, x: self.layer(x.transpose(0, 1).reshape(-1, 4).view(20, -1, 4)),
    "cut": lambda self, x: self.layer(torch.stack(x.unbind(1))),
    "joined": lambda self, x: self.layer(torch.cat(x.transpose(0, 1).chunk(2))),
    "back": lambda self, x: self.layer(x.mT.transpose(0, 2).contiguous().mT),
}


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("layers", [None, "all"])
def test_inputs_are_followed_where_sizes_do_not_tell(name: str, layers: str | None) -> None:
    model = One(INNER[name], layer=linear(4, 5))
    y = model.layer(SEQUENCES).detach()
    m2, v2 = by_hand_of_any(y.numpy(), 2, "units")
    for positions, inputs in (("units", 20), ("samples", 20), ("units", 12)):
        x = SEQUENCES[:inputs]
        m2, v2 = by_hand_of_any(y[: len(x)].numpy(), 2, positions)
        table = sv.probe(model, x, layers=layers, positions=positions)
        row = table[table.name == "layer"].iloc[0]
        assert row.v2 == pytest.approx(v2, rel=1e-4)
        assert row.m2 == pytest.approx(m2, rel=1e-4)
        assert row["shape"] == (20, 5)
        assert row.samples == len(x)


def test_init_follows_the_inputs() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.layer(x.transpose(0, 1))))

    def made() -> One:
        return One(forward, layer=linear(4, 30), last=linear(30, 5))

    for x in (SEQUENCES, SEQUENCES[:12]):
        model, plain = made(), made()
        plain.function = lambda self, x: self.last(torch.relu(self.layer(x)))
        for net in (model, plain):
            table = sv.init.sample_(net, x)
        torch.testing.assert_close(model.state_dict(), plain.state_dict())
        assert table.v2_after.tolist() == pytest.approx([1, 1], rel=1e-3)


def test_inputs_that_are_not_first_can_be_counted() -> None:
    lstm = nn.LSTM(4, 6)
    x = gaussian(7, 12, 4)
    table = sv.probe(lstm, x, inputs=12, layers="all", positions="units")
    output, (hidden, _) = lstm(x)
    assert table.name.tolist() == ["[0]", "[1][0]", "[1][1]"]
    for y, v2 in zip((output, hidden), table.v2, strict=False):
        expected = by_hand_of_any(y.detach().transpose(0, 1).numpy(), 2, "units")[1]
        assert v2 == pytest.approx(expected, rel=1e-5)


def test_what_cannot_be_followed_has_no_row() -> None:
    def mixed(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flatten(0, 1).roll(7, 0).unflatten(0, x.shape[:2])) + self.other(x)

    model = One(mixed, layer=linear(4, 5), other=linear(4, 5))
    with pytest.warns(UserWarning, match="a dimension that could not be followed: layer"):
        assert sv.probe(model, SEQUENCES).name.tolist() == ["other"]
    with pytest.warns(UserWarning, match=r"left as they are: 'layer' \(inputs not apart\)"):
        assert sv.init.total_(model, SEQUENCES).done.tolist() == ["set"]


@pytest.mark.parametrize(
    "module",
    [
        nn.LSTM(8, 8),
        nn.GRU(8, 8),
        nn.RNN(8, 8),
        nn.TransformerEncoderLayer(8, 2, 16),
        nn.MultiheadAttention(8, 2),
    ],
)
def test_sequences_over_inputs_are_named(module: nn.Module) -> None:
    def forward(self: Any, x: torch.Tensor) -> Any:
        given = [x] * 3 if isinstance(self.inner, nn.MultiheadAttention) else [x]
        found = self.inner(*given)
        return self.head(found[0] if isinstance(found, tuple) else found)

    model = One(forward, inner=module, head=linear(8, 2))
    message = r"1 modules run over the first dimension, .* \(batch_first=False.*: inner"
    with pytest.warns(UserWarning, match=message):
        sv.probe(model, gaussian(6, 5, 8), layers=["head"])
    model.function = lambda self, x: forward(self, x.transpose(0, 1))
    for inputs in (5, 6):  # and no warning
        assert sv.probe(model, gaussian(inputs, 5, 8), layers=["head"]).samples[0] == inputs


class Padded(torch.nn.Module):
    """A layer on tokens, one on their mean, and one on every other token."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.pooled, self.scores = linear(4, 8), linear(8, 3), linear(8, 6)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        y = self.tokens(x)
        self.scores(y[:, ::2])
        kept = y * mask[..., None]
        return self.pooled(kept.sum(1) / mask.sum(1, keepdim=True).clamp(min=1))


def test_padding_does_not_count() -> None:
    model, x = Padded(), gaussian(5, 6, 4)
    lengths = torch.tensor([6, 3, 1, 2, 5])
    mask = torch.arange(6) < lengths[:, None]
    batch = {"x": torch.where(mask[..., None], x, 99.0), "mask": mask}
    with pytest.warns(UserWarning, match="have other positions than the mask: scores"):
        table = sv.probe(model, batch, mask="mask", maximum=True)
    with torch.no_grad():
        alone = [model.tokens(x[a, : lengths[a]]).double() for a in range(5)]
    means = torch.stack([y.mean(0) for y in alone])
    m2 = np.mean(
        [float((means[a] * means[b]).mean()) for a in range(5) for b in range(5) if a != b]
    )
    row = table.set_index("name").loc["tokens"]
    assert row.m2 == pytest.approx(m2, rel=1e-5)
    sigma2 = np.mean([float(y.square().mean()) for y in alone])
    assert row.sigma2 == pytest.approx(sigma2, rel=1e-5)
    assert row.maximum == pytest.approx(max(float(y.abs().max()) for y in alone))
    assert row.samples == 5
    with pytest.warns(UserWarning, match="have other positions than the mask"):
        again = sv.probe(model, [batch, batch], mask=lambda batch: batch["mask"].int())
    assert again.set_index("name").sigma2["tokens"] == pytest.approx(sigma2, rel=1e-5)
    few = sv.probe(model, batch, mask=lambda batch: lengths > 1)  # whole inputs
    assert set(few.samples) == {4}


def test_bad_masks_are_refused() -> None:
    model, x = linear(4, 2), gaussian(5, 6, 4)
    for mask, error, message in (
        (3, TypeError, "mask must be a key of the batch or a function of it, got int"),
        ("mask", ValueError, "mask must be a key of the batch, got 'mask' for Tensor"),
        (lambda x: x[0], ValueError, r"mask must give a tensor .* of 5 inputs, got \(6, 4\)"),
        (lambda x: None, ValueError, "mask must give a tensor .* got NoneType"),
    ):
        with pytest.raises(error, match=message):
            sv.probe(model, x, mask=mask)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="positions must be 'samples' where a mask is given"):
        sv.probe(model, x, mask=lambda x: x[..., 0], positions="units")


def test_a_dictionary_as_one_argument() -> None:
    """Its signature tells whether it is the argument or holds the arguments."""
    batch, labels = {"a": gaussian(9, 8)}, torch.zeros(9)
    whole = One(lambda self, x: self.layer(x["a"]), layer=linear())
    for batches in (batch, [batch], [(batch, labels)], (batch,)):
        assert sv.probe(whole, batches).samples.tolist() == [9]

    class Named(Net):
        def forward(self, a: torch.Tensor) -> Any:
            return self.layer(a)

    assert sv.probe(Named(nn.Identity(), layer=linear()), batch).samples.tolist() == [9]
    given = {"b": gaussian(9, 8), "c": 1, "d": 2}
    with pytest.raises(TypeError, match=r"must have the model's arguments, .* says how the model"):
        sv.probe(Two(lambda self, x, y: self.layer(x), layer=linear()), given)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_layers_count_once(reentrant: bool) -> None:
    def forward(self: Any, x: torch.Tensor) -> Any:
        return self.last(checkpoint(self.first, x, use_reentrant=reentrant))

    model = One(forward, first=linear(8, 8), last=linear(8, 3))
    with sv.Probe(model) as probe:
        for seed in range(2):
            model(gaussian(9, 8, seed=seed).requires_grad_()).sum().backward()
    assert probe.table.name.tolist() == ["first", "last"] * 2
    with torch.no_grad():
        y = model.first(gaussian(9, 8, seed=1))
    assert probe.table.v2[2] == pytest.approx(float(sv.decompose(y).v2))


def test_models_may_return_anything() -> None:
    def forward(self: Any, x: torch.Tensor) -> Any:
        return torch.distributions.Categorical(logits=torch.log_softmax(self.layer(x), -1))

    model, x = One(forward, layer=linear(8, 5)), gaussian(40, 8)
    assert sv.probe(model, x).name.tolist() == ["layer"]
    assert [finding.kind for finding in sv.explain(model, x).findings] == ["nothing found"]
    assert sv.init.sample_(model, x).done.tolist() == ["set"]


def test_packed_sequences_have_rows_outside() -> None:
    def forward(self: Any, x: torch.Tensor, lengths: torch.Tensor) -> Any:
        packed = nn.utils.rnn.pack_padded_sequence(
            self.tokens(x), lengths, batch_first=True, enforce_sorted=False
        )
        return self.head(self.recurrent(packed)[1][0][-1])

    recurrent = nn.LSTM(8, 6, batch_first=True)
    model = Two(forward, tokens=linear(4, 8), recurrent=recurrent, head=linear(6, 3))
    batch = gaussian(20, 7, 4), torch.arange(20) % 7 + 1
    assert sv.probe(model, batch).name.tolist() == ["tokens", "head"]
    with pytest.warns(UserWarning, match=r"'recurrent' \(attention, recurrent or bilinear\)"):
        assert sv.init.total_(model, batch).done.tolist() == ["set", "set"]


class Two(Net):
    """The same, of two arguments."""

    def forward(self, x: Any, y: Any) -> Any:
        return self.function(self, x, y)
