"""The book's helpers against arithmetic by hand."""

import math
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

import svlib as sv

sys.path.insert(0, str(Path(__file__).parents[1] / "book"))
import claims
import decided
import depths
import laws
import long_runs
import runs
import ways


def losses() -> xr.DataArray:
    """Loss of initialization k, seed s at iteration i: (k + 1) (s + 1) (1 + i / 100)."""
    kinds, seeds, iterations = list(runs.TITLES), [0, 1], np.arange(0, 4000, 10)
    values = np.einsum("k,s,i->ksi", [3.0, 2.0, 1.0], [1.0, 2.0], 1 + iterations / 100)
    coords = {"initialization": kinds, "seed": seeds, "iteration": iterations}
    return xr.DataArray(values, coords, dims=list(coords))


def test_mean_losses_about_a_moment() -> None:
    near = np.arange(1500, 2500, 10)
    expected = 3 * (1 + near / 100).mean()
    found = long_runs.at(losses(), 2000).sel(initialization="total", seed=0)
    assert float(found) == pytest.approx(expected)
    at_end = long_runs.at(losses(), 4000).sel(initialization="batchnorm", seed=1)
    assert float(at_end) == pytest.approx(2 * (1 + np.arange(3500, 4000, 10) / 100).mean())


def test_bins_are_means_over_windows() -> None:
    found = long_runs.binned(losses()).sel(initialization="sample", seed=0)
    assert found.sizes["iteration"] == long_runs.BINS
    assert float(found[0]) == pytest.approx(2 * (1 + np.arange(0, 100, 10) / 100).mean())


def test_stored_ratios_are_paired_over_three_seeds() -> None:
    table = long_runs.ratios()
    row = table[(table.task == "cifar10") & (table.iteration == 20_000)].set_index("above")
    stored = long_runs.at(long_runs.load("cifar10"), 20_000)
    each = stored.sel(initialization="total") / stored.sel(initialization="sample")
    logs = np.log(each.values)
    assert row["ratio"]["total"] == pytest.approx(np.exp(logs.mean()))
    half = 4.30265 * logs.std(ddof=1) / 3**0.5  # Student's t of two degrees of freedom
    assert row["high"]["total"] == pytest.approx(np.exp(logs.mean() + half), rel=1e-4)
    assert row["paper"]["total"] == pytest.approx(0.884 / 0.561)


def test_sizes_in_the_claims_are_those_read_off() -> None:
    stated = claims.stated()["05-training"]
    last = long_runs.ratios().groupby(["task", "above"], as_index=False).last()
    assert len(last) == 4
    for row in last.itertuples():
        claim = stated[f"{row.task}_long_{row.above}_{row.below}_size"]
        assert claim["paper"] == pytest.approx(float(str(row.paper)), abs=5e-4)


def test_alternatives_of_claims_are_what_they_say() -> None:
    stated = claims.stated()
    exact, correlation = sv.theory.trajectory(200), sv.theory.maps.correlation
    expected = {
        **{f"03-finite-width.width{n}": exact.ratio[49] for n in (30, 100, 300, 1000, 3000)},
        **{f"03-finite-width.early{n}": exact.ratio[10] for n in (100, 300)},
        "01-two-variances.deep": exact.fraction[1],
        "02-infinite-width.layer10": 2**0.5 / (3 * math.pi) * 10,
        "02-infinite-width.layer50": 2**0.5 / (3 * math.pi) * 50,
        "03-finite-width.plateau": 256 / exact.ratio[200] ** 2,
        "03-finite-width.band": sv.theory.band_plateau()[1],
        "03-finite-width.angles": -2 / 32,
        "04-batchnorm.ratio10": exact.ratio[10],
        "04-batchnorm.held30": correlation(-1 / 31),
        "04-batchnorm.drift15": correlation(-1 / 255),
        "04-batchnorm.gradient": math.pi / (math.pi - 1),
    }
    for name, value in expected.items():
        chapter, key = name.split(".")
        assert stated[chapter][key]["other"] == pytest.approx(value, rel=8e-4), name
    for key, (width, batch, layer) in {"held30": (512, 32, 30), "drift15": (512, 256, 15)}.items():
        law = 1 - sum(x[layer] for x in sv.theory.batchnorm.first_order(width, 49, batch))
        assert stated["04-batchnorm"][key]["paper"] == pytest.approx(law, abs=5e-5)


def test_claims_of_few_seeds_want_their_interval() -> None:
    table = long_runs.ratios().set_index(["task", "iteration", "above"])
    row = table.xs(("micrographs", 10_000, "total"))
    found = long_runs.claimed(table.reset_index())["micrographs_long_total_sample"]
    assert found == pytest.approx((row.ratio, row.error, 3))
    # 3 errors from 1: enough for two standard errors, not for three seeds (4.3)
    assert claims.verdict(">", 1, 1.3, 0.1, 0) == "reproduced"
    few = claims._row(
        "key", {"text": "", "paper": 1, "relation": ">", "digits": 1, "source": ""}, 1.3, 0.1, 3
    )
    assert (few["verdict"], few["allowed"]) == ("open", "4.3 errors")


def test_held_out_errors_and_the_best_rates_at_the_end_by_hand() -> None:
    folder = claims.RESULTS
    errors = []
    for kind in ("total", "batchnorm"):
        with xr.open_dataset(folder / "overnight" / f"length-cifar10-{kind}.nc") as record:
            errors.append(record.held_out_error.values[0, 0, :, -1])
    apart = 100 * (errors[0] - errors[1])
    mean, half = decided.points("total", "batchnorm")
    assert mean == pytest.approx(apart.mean())
    assert half == pytest.approx(4.30265 * apart.std(ddof=1) / 3**0.5, rel=1e-4)
    one = xr.load_dataset(folder / "settings" / "constant-total-0.01-2.nc")
    at = decided.ends("constant").sel(initialization="total", learning_rate=0.01, seed=2)
    assert float(at.loss) == pytest.approx(float(one.loss[-50:].mean()), rel=1e-6)
    assert float(at.held_out_error) == float(one.held_out_error[-1])
    rates = decided.best().learning_rate
    assert rates["total"] < 0.03  # the best of a trial of 2,000 iterations


def test_ratios_in_words() -> None:
    final = losses().mean("iteration").expand_dims(learning_rate=[0.1])
    at = dict.fromkeys(runs.TITLES, 0.1)
    assert runs.told(final, "total", "sample", at) == "1.50 (1.50 to 1.50)"
    lost = final.where(final.initialization != "sample", np.inf)
    assert runs.told(lost, "total", "sample", at) == "diverged"


def test_ways_in_words() -> None:
    rows = [[0.5, 1.4, 2.0, 2.1, "x"], [1.0, 1.0, 2.0, 4.0, "y"], [1.0, 1.0, np.nan, np.nan, "z"]]
    columns = ["kept", "gradients", "at 100", "at 200", "price"]
    table = pd.DataFrame(rows, ["a", "b", "c"], columns)
    plateaus = [line[3] for line in ways.lines(table)]
    assert plateaus == ["yes: 2.0, 2.1", "no: 2.0, 4.0", "no mean, by construction"]


def test_a_block_is_what_its_formula_says() -> None:
    y = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    block = ways.Block(16, torch.Generator().manual_seed(1), slope=0.3, residual=0.5)
    activation = torch.where(y > 0, y, 0.3 * y)
    expected = y + 0.5**0.5 * (activation @ block.linear.weight.T)
    torch.testing.assert_close(block(y), expected)
    wide = ways.Block(1000, torch.Generator().manual_seed(1), slope=0.3)
    assert float(wide.linear.weight.detach().var()) == pytest.approx(2 / 1.09 / 1000, rel=0.01)


def overnight() -> list[tuple[str, str]]:
    """Files and commands of the longer runs, as the README beside them has them."""
    folder = Path(long_runs.__file__).parent / "results" / "overnight"
    rows = [line.split("|") for line in (folder / "README.md").read_text().splitlines()]
    found = [(str(folder / row[1].strip()), row[2].strip(" `")) for row in rows if len(row) == 4]
    return [(name, command) for name, command in found if name.endswith(".nc")]


@pytest.mark.parametrize(("name", "command"), overnight(), ids=lambda x: Path(x).name[:24])
def test_records_are_what_their_commands_make(name: str, command: str) -> None:
    record, words = xr.load_dataset(name, engine="scipy"), command.split()
    values: dict[str, list[str]] = {}
    for key, value in pairwise(words):
        if key.startswith("--"):
            values.setdefault(key, []).append(value)
    assert record.attrs["data"] == words[0]
    assert sorted(record.initialization.values) == sorted(values["--init"])
    assert sorted(record.learning_rate.values) == sorted(map(float, values["--rate"]))
    assert record.sizes["seed"] == int(values["--seeds"][0])
    usual = {"cifar10": 20_000, "micrographs": 10_000}[words[0]]
    assert record.attrs["iterations"] == int(values.get("--iterations", [str(usual)])[0])
    assert record.attrs["width"] == {"cifar10": 24, "micrographs": 8}[words[0]]
    assert (record.layer[0], record.attrs["batch_size"] > 0) == (0, True)


def test_every_record_has_a_command() -> None:
    folder = Path(long_runs.__file__).parent / "results" / "overnight"
    assert {str(path) for path in folder.glob("*.nc")} == {name for name, _ in overnight()}
    assert sum(path.stat().st_size for path in folder.parent.rglob("*.nc")) < 5_000_000


def solutions() -> list[tuple[str, str]]:
    """Python in the folded solutions of the exercises, with its chapter."""
    found = []
    for path in sorted(Path(long_runs.__file__).parent.glob("0*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            blocks = re.findall(r"```python\n(.*?)```", cell.source, re.DOTALL)
            found += [(path.stem, block) for block in blocks if cell.cell_type == "markdown"]
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("chapter", "code"), solutions(), ids=lambda x: x[:20].split("\n")[0])
def test_solutions_run(chapter: str, code: str) -> None:
    exec(compile(code, chapter, "exec"), {})


def test_numbers_in_solutions() -> None:
    assert int((sv.theory.trajectory(100).fraction > 0.01).sum()) == 57
    assert round(float(sv.theory.finite_width(266, 2000).ratio[-1]), 1) == 5.0
    assert sv.theory.batchnorm.is_held(10_819, 128)
    assert not sv.theory.batchnorm.is_held(10_818, 128)
    options: Any = {"activation": "leaky_relu", "negative_slope": 0.3}
    assert sv.theory.plateau(**options) > sv.theory.plateau()  # of v^2/m^2, so m/v is lower
    linear = sv.simulate(1024, 49, networks=12, samples=100, seed=0, activation="linear")
    assert float(linear.fraction[:, 49].mean()) > 0.9


def test_frames_are_orthogonal_weights() -> None:
    """Units drawn as frames of the inputs' products, against matrices, at layer 4."""
    inputs = torch.eye(32, dtype=torch.float64)[:16]
    record = sv.simulate(
        32, 4, networks=600, inputs=inputs, seed=3, weights="orthogonal", dtype="float64"
    )
    matrices = record.v2_over_m2.values[:, 4]
    drawn = laws.frames(32, 4, 600, torch.Generator().manual_seed(4)).numpy()
    error = math.hypot(drawn.std(), matrices.std()) / math.sqrt(600)
    assert abs(drawn.mean() - matrices.mean()) < 4 * error < 0.15 * matrices.mean()


def test_the_best_rate_of_a_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ["depth,start,rate,seed,loss"]
    rows += [
        f"10,He,{rate},{seed},{loss + seed}"
        for rate, loss in ((0.1, 3), (0.2, 1))
        for seed in (0, 1)
    ]
    rows += ["10,He,0.3,0,0.0", "10,He,0.3,1,inf"]  # one diverged
    path = tmp_path / "depths.csv"
    path.write_text("\n".join(rows))
    monkeypatch.setattr(depths, "PATH", path)
    best = depths.best().reset_index().iloc[0]
    assert (best.rate, best.loss, best.error) == (0.2, 1.5, 0.5)
