"""``svlib probe``, ``check`` and ``init``: what they write, and one line for what goes wrong."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

import svlib as sv
from svlib.__main__ import main

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

def biased():
    model = nn.Sequential(nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(),
    nn.Linear(30, 9))
    model[2].bias.data += 100
    return model

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


def test_probe_shows_table_and_findings_and_writes_a_page() -> None:
    words = ("--input", "digits", "--samples", "100", "--html", "page.html")
    done = run("probe", "models_of_mine.py:make_model", *words)
    assert done.exit_code == 0, done.output
    assert "Conv2d" in done.output
    assert "nothing found: in 2 of 2 signals" in done.output
    page = Path("page.html").read_text(encoding="utf-8")
    for part in ("<svg", "nothing found: in 2 of 2", "<td>Conv2d</td>", str(torch.__version__),
                 "(100, 1, 16, 16)"):  # fmt: skip
        assert part in page
    outside = [x for x in ("<script", "<link", "src=", "url(http", "@import") if x in page]
    assert not outside  # it needs nothing else


def test_probe_equals_the_function() -> None:
    words = ("--input", "6", "--samples", "50", "--seed", "3")
    shown = run("probe", "models_of_mine:instance", *words).output
    import models_of_mine  # type: ignore[import-not-found]

    table = sv.probe(models_of_mine.instance, sv.data.gaussian(50, 6, seed=3))
    assert f"{table.v2[0]:.3g}" in shown
    done = run("probe", "models_of_mine:Tokens", "--input", "7", "--tokens", "9", "--samples", "30")
    assert done.exit_code == 0, done.output


def test_files_of_doubles_and_of_several_arguments() -> None:
    done = run("probe", "models_of_mine:instance", "--input", "doubles.npy")
    assert done.exit_code == 0, done.output
    done = run("probe", "models_of_mine:Masked", "--input", "masked.npz", "--html", "page.html")
    assert done.exit_code == 0, done.output
    page = Path("page.html").read_text(encoding="utf-8")
    assert "{&#x27;x&#x27;: (20, 6), &#x27;mask&#x27;: (20, 1)}" in page
    done = run("init", "models_of_mine:Masked", "--input", "masked.npz", "--output", "masked.pt")
    assert done.exit_code == 0, done.output


def test_training_and_evaluation_mode() -> None:
    words = ("probe", "models_of_mine:normalized", "--input", "6", "--samples", "40", "--html",
             "page.html")  # fmt: skip
    for extra, mode in (((), "training"), (("--eval",), "evaluation")):
        shown = run(*words, *extra).output
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            model = __import__("models_of_mine").normalized().train(mode == "training")
        v2 = sv.probe(model, sv.data.gaussian(40, 6, seed=0)).v2
        assert f"{v2[1]:.3g}" in shown
        assert f"<dt>mode</dt><dd>{mode}</dd>" in Path("page.html").read_text(encoding="utf-8")


def test_check_fails_on_what_it_is_told_to() -> None:
    words = ("models_of_mine:biased", "--input", "6", "--samples", "40")
    done = run("check", *words)
    assert done.exit_code == 1, done.output
    assert done.output.startswith("collapse: ")
    assert run("check", *words, "--fail-on", "mixing,statistics").exit_code == 0
    assert run("check", *words, "--fail-on", "collapse").exit_code == 1
    found = json.loads(run("check", *words, "--json").output)
    assert found[0]["kind"] == "collapse"
    assert "the bias of" in found[0]["cause"]
    assert run("check", "models_of_mine:instance", "--input", "6").exit_code == 0
    assert run("check", "models_of_mine:instance", "--input", "7").exit_code == 2


def test_a_console_script_finds_modules_of_the_current_folder() -> None:
    """And a model in random.py does not take the place of the standard library's."""
    Path("random.py").write_text("from torch import nn\n\ndef net():\n    return nn.Linear(6, 4)\n")
    script = Path(sys.executable).with_name("svlib")
    for model in ("random.py:net", "models_of_mine:make_model"):
        shape = "6" if "random" in model else "1,16,16"
        words = [str(script), "probe", model, "--input", shape, "--samples", "20"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


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
        if line.startswith("Warning: squared gradients now grow")
    ]
