"""``svlib probe`` and ``svlib init``: what they write, and one line for what goes wrong."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner, Result

import svlib as sv
from svlib.__main__ import main
from svlib.probing.rows import POSITIONS

CODE = """
from dataclasses import dataclass
import torch
from torch import nn
import sibling

@dataclass
class Sizes:
    width: int = 12

def make_model():
    return nn.Sequential(nn.Conv2d(1, Sizes.width, 3, padding=1), nn.ReLU(), nn.Flatten(),
    nn.Linear(Sizes.width * 256, 4))

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.scores = nn.Embedding(9, 8), nn.Linear(8, 9)
    def forward(self, ids):
        return self.scores(self.embedding(ids).relu())

def normalized():
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))

class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
    def forward(self, x, mask):
        return self.layer(x) * mask

def sized(width=5, norm="none"):
    return nn.Sequential(nn.Linear(6, width), *[nn.BatchNorm1d(width)] * (norm == "batch"))

instance = nn.Linear(6, 3)
number = 3
def fails():
    raise KeyError("of the user's")
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models_of_mine.py").write_text(CODE)
    (tmp_path / "sibling.py").write_text("")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 9, (20, 5)))
    np.save(tmp_path / "doubles.npy", np.random.default_rng(0).normal(size=(20, 6)))
    mask = np.ones((20, 1), dtype=bool)
    np.savez(tmp_path / "masked.npz", x=np.random.default_rng(0).normal(size=(20, 6)), mask=mask)
    np.savez(tmp_path / "uneven.npz", x=np.ones((20, 6)), mask=mask[:3])
    np.save(tmp_path / "objects.npy", np.array([{}, {}]), allow_pickle=True)
    (tmp_path / "empty.pt").touch()
    np.save(tmp_path / "words.npy", np.array(["a", "b"]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


def run(*words: str) -> Result:
    with torch.random.fork_rng([]):
        return CliRunner().invoke(main, words)


def test_probe_shows_the_table_and_the_diagnosis_and_writes_a_page() -> None:
    done = run(
        "probe",
        "models_of_mine.py:make_model",
        "--input",
        "digits",
        "--samples",
        "100",
        "--html",
        "page.html",
    )
    assert done.exit_code == 0, done.output
    assert "Conv2d" in done.output
    assert "theory: covers no row; it stops at flatten of positions (1)" in done.output
    page = Path("page.html").read_text(encoding="utf-8")
    for part in (
        "<svg",
        "<b>theory</b>: covers no row",
        "<td>Conv2d</td>",
        str(torch.__version__),
        "(100, 1, 16, 16)",
    ):
        assert part in page
    assert not [
        word for word in ("<script", "<link", "src=", "url(http", "@import") if word in page
    ]  # it needs nothing else


def test_probe_equals_the_function() -> None:
    shown = run(
        "probe",
        "models_of_mine:instance",
        "--input",
        "6",
        "--samples",
        "50",
        "--seed",
        "3",
        "--batch",
        "20",
    ).output
    import models_of_mine  # type: ignore[import-not-found]

    table = sv.probe(models_of_mine.instance, sv.data.gaussian(50, 6, seed=3))
    assert f"{table.v2[0]:.3g}" in shown
    tokens = (
        "probe",
        "models_of_mine:Tokens",
        "--input",
        "ids.npy",
        "--layer",
        "all",
        "--eval",
        "--positions",
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = models_of_mine.Tokens().eval()
    for positions in POSITIONS:
        shown = run(*tokens, positions).output
        table = sv.probe(
            model, torch.from_numpy(np.load("ids.npy")), layers="all", positions=positions
        )
        assert table.name.tolist() == ["embedding", "relu", "scores"]
        assert f"{table.m2[0]:.3g}" in shown
    some = run("probe", "models_of_mine:Tokens", "--input", "ids.npy", "--layer", "sc*").output
    assert "scores" in some
    assert "relu" not in some


def test_files_of_doubles_and_of_several_arguments() -> None:
    done = run("probe", "models_of_mine:instance", "--input", "doubles.npy")
    assert done.exit_code == 0, done.output
    done = run(
        "probe",
        "models_of_mine:Masked",
        "--input",
        "masked.npz",
        "--batch",
        "7",
        "--html",
        "page.html",
    )
    assert done.exit_code == 0, done.output
    assert "{&#x27;x&#x27;: (20, 6), &#x27;mask&#x27;: (20, 1)}" in Path("page.html").read_text(
        encoding="utf-8"
    )
    done = run("init", "models_of_mine:Masked", "--input", "masked.npz", "--output", "masked.pt")
    assert done.exit_code == 0, done.output


class Opens:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, ("opened", "w")


def test_a_checkpoint_that_holds_more_than_weights_is_refused() -> None:
    torch.save({"weight": Opens()}, "checkpoint.pt")
    done = run("probe", "models_of_mine:instance", "--input", "6", "--checkpoint", "checkpoint.pt")
    assert done.exit_code == 1
    assert "Weights only load failed" in done.output
    assert not Path("opened").exists()


@pytest.mark.parametrize(
    ("key", "prefix"),
    [("", "module."), ("state_dict", ""), ("state_dict", "model."), ("model", "module._orig_mod.")],
)
def test_wrapped_checkpoints(key: str, prefix: str) -> None:
    words = ("probe", "models_of_mine:sized", "--input", "6", "--samples", "40")
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        model = __import__("models_of_mine").sized()
    state = {prefix + name: value for name, value in model.state_dict().items()}
    torch.save({key: state, "epoch": 3} if key else state, "wrapped.pt")
    done = run(*words, "--checkpoint", "wrapped.pt", "--table", "table.json")
    assert done.exit_code == 0, done.output
    expected = sv.probe(model, sv.data.gaussian(40, 6, seed=0))
    np.testing.assert_allclose(pd.read_json("table.json").v2, expected.v2, rtol=1e-6)
    state.popitem()
    torch.save(state | {"other": torch.ones(1)}, "wrong.pt")
    told = run(*words, "--checkpoint", "wrong.pt").output.splitlines()[-1]
    assert "--checkpoint must have the model's names, got " in told
    assert " missing (" in told
    assert " unknown (" in told


def test_tokens_and_arguments() -> None:
    words = ("--samples", "30", "--table", "table.csv")
    done = run("probe", "models_of_mine:Tokens", "--input", "7", "--tokens", "9", *words)
    assert done.exit_code == 0, done.output
    assert pd.read_csv("table.csv")["shape"].tolist() == ["[7, 9]"]
    done = run(
        "probe", "models_of_mine:sized", "--input", "6", *words, "--arg", "width=4", "--layer",
        "all", "--arg", "norm=batch",
    )  # fmt: skip
    assert pd.read_csv("table.csv").type.tolist() == ["Linear", "BatchNorm1d"]


@pytest.mark.parametrize("ending", ["csv", "json", "parquet", "feather"])
def test_tables_of_every_kind_hold_the_same_numbers(ending: str) -> None:
    done = run("probe", "models_of_mine:sized", "--input", "6", "--table", f"table.{ending}")
    assert done.exit_code == 0, done.output
    found = getattr(pd, f"read_{ending}")(f"table.{ending}")
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        table = sv.probe(__import__("models_of_mine").sized(), sv.data.gaussian(256, 6, seed=0))
    np.testing.assert_allclose(found.m2, table.m2, rtol=1e-5)
    getattr(table, f"to_{ending}")(f"direct.{ending}")  # without a word from pandas


def test_training_and_evaluation_mode() -> None:
    words = (
        "probe",
        "models_of_mine:normalized",
        "--input",
        "6",
        "--samples",
        "40",
        "--html",
        "page.html",
    )
    for extra, mode in (((), "training"), (("--eval",), "evaluation")):
        shown = run(*words, *extra).output
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            model = __import__("models_of_mine").normalized().train(mode == "training")
        v2 = sv.probe(model, sv.data.gaussian(40, 6, seed=0)).v2
        assert f"{v2[1]:.3g}" in shown
        assert f"<dt>mode</dt><dd>{mode}</dd>" in Path("page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("method", ["total", "sample"])
def test_init_writes_weights_that_probe_can_load(method: str) -> None:
    model = ("models_of_mine.py:make_model", "--input", "digits")
    done = run("init", *model, "--method", method, "--gradients", "--output", "weights.pt")
    assert done.exit_code == 0, done.output
    assert "gradient2_after" in done.output
    state = torch.load("weights.pt", weights_only=True)
    made = __import__("models_of_mine").make_model()
    made.load_state_dict(state)
    table = sv.probe(made, sv.data.digits().images[:256])
    np.testing.assert_allclose(table.sigma2 if method == "total" else table.v2, 1, rtol=1e-3)
    loaded = run("probe", *model, "--checkpoint", "weights.pt")
    assert f"{table.v2[0]:.3g}" in loaded.output
    again = run("init", *model, "--output", "weights.pt")
    assert again.exit_code == 1
    assert "output must not exist, got weights.pt" in again.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere:make", "--input", "3"], "ModuleNotFoundError: No module named 'nowhere'"),
        (
            ["nowhere.py:make", "--input", "3"],
            "FileNotFoundError: [Errno 2] No such file or directory",
        ),
        (
            ["models_of_mine", "--input", "3"],
            "MODEL must be package.module:NAME or file.py:NAME, got 'models_of_mine'",
        ),
        (["models_of_mine:nothing", "--input", "3"], "has no attribute 'nothing'"),
        (
            ["models_of_mine:number", "--input", "3"],
            "MODEL must be a torch.nn.Module or make one, got int",
        ),
        (
            ["models_of_mine:dataclass", "--input", "3"],
            "MODEL must be a torch.nn.Module or make one, got function",
        ),
        (["models_of_mine:fails", "--input", "3"], 'KeyError: "of the user\'s"'),
        (
            ["models_of_mine:instance", "--input", "3,x"],
            "--input must be sizes like 3,32,32, digits or a file FILE.npy or FILE.npz, got '3,x'",
        ),
        (["models_of_mine:instance", "--input", "0"], "--input must be sizes like 3,32,32"),
        (["models_of_mine:instance", "--input", "no.npy"], "No such file or directory: 'no.npy'"),
        (
            ["models_of_mine:instance", "--input", "objects.npy"],
            "Object arrays cannot be loaded when allow_pickle=False",
        ),
        (
            ["models_of_mine:instance", "--input", "words.npy"],
            "--input must hold numbers, inputs along the first dimension",
        ),
        (
            ["models_of_mine:Masked", "--input", "uneven.npz"],
            "--input must hold arrays of as many inputs each, got {'x': (20, 6)",
        ),
        (["models_of_mine:instance", "--input", "5"], "mat1 and mat2 shapes cannot be multiplied"),
        (
            ["models_of_mine:instance", "--input", "6", "--samples", "1"],
            "1 is not in the range x>=2",
        ),
        (
            ["models_of_mine:instance", "--input", "6", "--seed", "-1"],
            "-1 is not in the range x>=0",
        ),
        (
            ["models_of_mine:instance", "--input", "6", "--device", "abacus"],
            "device must be one of ['cpu'",
        ),
        (
            ["models_of_mine:instance", "--input", "6", "--checkpoint", "objects.npy"],
            "UnpicklingError",
        ),
        (
            ["models_of_mine:instance", "--input", "6", "--checkpoint", "no.pt"],
            "Path 'no.pt' does not exist",
        ),
        (["models_of_mine:instance", "--input", "6", "--batch", "0"], "0 is not in the range x>=1"),
        (
            ["models_of_mine:instance", "--input", "6", "--layer", "x"],
            "model must call what layers names, got none called",
        ),
        (
            ["models_of_mine:make_model", "--input", "1,16,16", "--layer", "33"],
            "--layer must be one of 4 names like 3, got '33'",
        ),
        (
            ["models_of_mine:instance", "--input", "6", "--arg", "width=3"],
            "--arg must go with a function or class, got the model 'instance'",
        ),
        (["models_of_mine:sized", "--input", "6", "--arg", "3"], "--arg must be NAME=VALUE"),
        (
            ["models_of_mine:instance", "--input", "6", "--table", "t.txt"],
            "--table must end in one of .csv, .json, .parquet, .feather, got t.txt",
        ),
        (
            ["models_of_mine:instance", "--input", "6", "--positions", "x"],
            "'x' is not one of 'samples', 'units'",
        ),
        (
            ["models_of_mine:instance", "--input", "6", "--checkpoint", "empty.pt"],
            "--checkpoint must hold a state dictionary, got empty.pt, empty",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value),
)
def test_one_line_for_bad_input(words: list[str], message: str) -> None:
    done = run("probe", *words)
    assert done.exit_code != 0
    assert message in done.output
    assert "Traceback" not in done.output
    assert done.output.splitlines()[-1].startswith("Error: ")


@pytest.mark.parametrize("command", ["probe --html", "init --output"])
@pytest.mark.parametrize("target", [".", "empty.pt/file"])
def test_targets_are_refused_before_anything_is_measured(command: str, target: str) -> None:
    done = run(*command.split(), target, "models_of_mine:fails", "--input", "3")
    assert done.exit_code == 2
    assert "Invalid value for '--" in done.output
    assert "KeyError" not in done.output


def test_output_in_a_stream_that_has_no_greek() -> None:
    deep = (
        "from torch import nn\nmodel = nn.Sequential(nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 9))"
    )
    Path("deep.py").write_text(deep)
    done = CliRunner(charset="cp1252").invoke(main, ["probe", "deep.py:model", "--input", "9"])
    assert done.exit_code == 0, done.exception
    assert b"?" in done.stdout_bytes  # a sigma


def test_a_warning_is_one_line() -> None:
    layers = "x for _ in range(20) for x in (nn.Linear(40, 40), nn.ReLU())"
    deep = f"from torch import nn\nmodel = nn.Sequential(*[{layers}])"
    Path("deep.py").write_text(deep)
    done = run("init", "deep.py:model", "--input", "40", "--output", "deep.pt")
    assert done.exit_code == 0, done.output
    assert [
        line
        for line in done.output.splitlines()
        if line.startswith("Warning: with sample init squared gradients grow")
    ]
