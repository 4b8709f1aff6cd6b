"""Architectures of others, built from their own code with random weights, for chapter 6.

``python book/architectures.py`` trains each of four for 200 steps, as it comes and after
total or sample init, at a grid of learning rates and four seeds, and writes
``results/architectures.csv``, in ten minutes on two cores. Finished points are kept in
``STORE`` (the first argument, by default ``results/architectures.store``).
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import svlib as sv
import torch
import xarray as xr
from sklearn import datasets
from svlib.probing.models import weighted_layers
from torch import nn

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs the network
with warnings.catch_warnings(
    action="ignore"
):  # in a notebook its import warns
    import transformers

transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]

RESULTS = Path(__file__).parent / "results"
STEPS, BATCH, LAST, SEEDS = 200, 16, 40, 4
SGD_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
ADAM_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
REPAIRS = {
    "as it comes": None,
    "total init": sv.init.total_,
    "sample init": sv.init.sample_,
}


def resnet() -> nn.Module:
    """A ResNet of twelve blocks, with BatchNorm."""
    sizes: dict[str, Any] = {
        "num_channels": 1,
        "embedding_size": 16,
        "hidden_sizes": [16, 32, 64],
        "depths": [4, 4, 4],
        "layer_type": "basic",
        "num_labels": 10,
    }
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(**sizes)
    )


def plain_resnet() -> nn.Module:
    """The same with the identity in place of BatchNorm, whose shift becomes a bias."""
    model = resnet()
    for block in list(model.modules()):
        for name, part in list(block.named_children()):
            if isinstance(part, nn.BatchNorm2d):
                setattr(block, name, nn.Identity())
                bias = nn.Parameter(torch.zeros(part.num_features))
                block.get_submodule("convolution").bias = bias
    return model


def vit() -> nn.Module:
    """A vision transformer of six layers, 16 patches and the class token."""
    sizes: dict[str, Any] = {
        "num_channels": 1,
        "image_size": 16,
        "patch_size": 4,
        "hidden_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "num_labels": 10,
    }
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes)
    )


def gpt2() -> nn.Module:
    """A GPT-2 of six layers, on bytes."""
    sizes: dict[str, Any] = {
        "vocab_size": 256,
        "n_positions": 32,
        "n_embd": 64,
        "n_layer": 6,
        "n_head": 4,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes)
    )


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "ResNet": resnet,
    "ResNet without BatchNorm": plain_resnet,
    "ViT": vit,
    "GPT-2": gpt2,
}


def make(name: str, seed: int) -> nn.Module:
    """An architecture with its authors' random weights, in training mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ARCHITECTURES[name]().train()


def texts() -> torch.Tensor:
    """What scikit-learn says of its small data sets, in bytes: (texts, 32)."""
    loaders = (
        datasets.load_breast_cancer,
        datasets.load_digits,
        datasets.load_iris,
        datasets.load_wine,
    )
    read = np.frombuffer(
        "".join(load().DESCR for load in loaders).encode(), np.uint8
    )
    return torch.from_numpy(
        read[: len(read) // 32 * 32].reshape(-1, 32).astype(np.int64)
    )


def calibration(name: str) -> dict[str, torch.Tensor]:
    """256 inputs that an architecture can be called with."""
    if name == "GPT-2":
        return {"input_ids": texts()[:256]}
    return {"pixel_values": sv.data.digits().images[:256]}


def held_out(name: str) -> dict[str, torch.Tensor]:
    """Inputs that calibration has not seen."""
    if name == "GPT-2":
        return {"input_ids": texts()[256:]}
    return {"pixel_values": sv.data.digits().held_out_images}


def batches(name: str, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Training batches with labels, in random order."""
    generator = torch.Generator().manual_seed(seed)
    digits, read = sv.data.digits(), texts()
    for _ in range(STEPS):
        if name == "GPT-2":
            rows = torch.randint(
                len(read), (BATCH,), generator=generator
            )
            yield {"input_ids": read[rows], "labels": read[rows]}
        else:
            rows = torch.randint(
                len(digits.images), (BATCH,), generator=generator
            )
            yield {
                "pixel_values": digits.images[rows],
                "labels": digits.labels[rows],
            }


def train(
    architecture: str,
    initialization: str,
    learning_rate: float,
    seed: int,
    steps: int = STEPS,
) -> xr.Dataset:
    """Losses of one run, by step: SGD with momentum for ResNets, Adam for transformers."""
    model = make(architecture, seed)
    repair = REPAIRS[initialization]
    if repair is not None:
        repair(model, calibration(architecture))
    optimizer: torch.optim.Optimizer
    if architecture.startswith("ResNet"):
        optimizer = torch.optim.SGD(
            model.parameters(), learning_rate, momentum=0.9
        )
    else:
        optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    losses = np.full(steps, np.nan)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # of dropout
        for step, batch in zip(
            range(steps), batches(architecture, seed), strict=False
        ):
            loss = model(**batch).loss
            if not torch.isfinite(loss):
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[step] = loss.item()
    return xr.Dataset({"loss": ("step", losses)})


def points() -> list[dict[str, Any]]:
    """Every run of the record."""
    return [
        {
            "architecture": architecture,
            "initialization": initialization,
            "learning_rate": rate,
            "seed": seed,
        }
        for architecture in ARCHITECTURES
        for initialization in REPAIRS
        for rate in (
            SGD_RATES
            if architecture.startswith("ResNet")
            else ADAM_RATES
        )
        for seed in range(SEEDS)
    ]


def zoo() -> dict[str, tuple[nn.Module, Any]]:
    """Small models of sixteen kinds, with random weights and a batch for each."""
    images = sv.data.gaussian(8, 3, 32, 32, seed=0)
    tokens = sv.data.gaussian(8, 6, 24, seed=0)
    words = torch.randint(
        90, (8, 12), generator=torch.Generator().manual_seed(0)
    )
    ids, pairs = (
        {"input_ids": words},
        {"input_ids": words, "decoder_input_ids": words},
    )
    small: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    of_text = small | {
        "vocab_size": 100,
        "eos_token_id": 2,
        "bos_token_id": 1,
    }
    of_images = small | {"image_size": 32, "patch_size": 8}
    stages: dict[str, Any] = {
        "hidden_sizes": [16, 32],
        "depths": [2, 2],
    }
    swin: dict[str, Any] = {
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [2, 4],
    }
    t5 = {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
    }
    clip: dict[str, Any] = {
        "text_config": of_text | {"pad_token_id": 0},
        "vision_config": of_images,
    }

    def made(kind: str, **sizes: Any) -> nn.Module:
        """A model of transformers, by the name that it and its configuration share."""
        config = getattr(transformers, f"{kind}Config")(**sizes)
        model: nn.Module = getattr(transformers, f"{kind}Model")(config)
        return model

    layer = nn.TransformerEncoderLayer(24, 4, 48, batch_first=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {
            "MLP": (
                sv.networks.mlp(
                    24, width=100, depth=9, outputs=9, seed=0
                ),
                tokens,
            ),
            "ALL-CNN-C": (sv.networks.all_cnn_c(12, seed=0), images),
            "U-Net": (
                sv.networks.UNet(8, levels=2, seed=0),
                images[:, :1],
            ),
            "ResNet": (
                made("ResNet", embedding_size=8, **stages),
                images,
            ),
            "ConvNeXt": (
                made("ConvNext", num_stages=2, **stages),
                images,
            ),
            "MobileNetV2": (made("MobileNetV2", image_size=32), images),
            "ViT": (made("ViT", **of_images), images),
            "Swin": (
                made(
                    "Swin",
                    image_size=32,
                    patch_size=2,
                    window_size=4,
                    **swin,
                ),
                images,
            ),
            "BERT": (made("Bert", **of_text), ids),
            "GPT-2": (gpt2(), ids),
            "Llama": (made("Llama", **of_text), ids),
            "T5": (made("T5", vocab_size=100, **t5), pairs),
            "CLIP": (
                made("CLIP", **clip),
                ids | {"pixel_values": images},
            ),
            "Mamba": (made("Mamba", **of_text), ids),
            "torch's Transformer": (
                nn.TransformerEncoder(layer, 2),
                tokens,
            ),
            "torch's LSTM": (nn.LSTM(24, 32, batch_first=True), tokens),
        }


def supported(model: nn.Module, batch: Any) -> tuple[str, str, str]:
    """What probe, explain and sample_ can do with a model, in words."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # of probe; the numbers say it
        found = sv.explain(model, batch)
        judged = f"{int(found.trace.judged.sum())} signals"
        without = [x for x in found.not_judged if "give loss=" not in x]
        judged += f"; not {'; '.join(without)}" if without else ""
        try:
            layers = len(weighted_layers(model))
            done = sv.init.sample_(model, batch).done
            counts = done.value_counts().items()
            repaired = ", ".join(
                f"{count} {what}" for what, count in counts
            )
        except ValueError as error:
            return "only by layers='all'", judged, f"no: {error}"
    return f"{len(found.table)} of {layers}", judged, repaired


def main() -> None:
    """Run what is missing and write the table: the mean loss of the last 40 steps,
    not a number where a run diverged."""
    store = (
        Path(sys.argv[1])
        if len(sys.argv) > 1
        else RESULTS / "architectures.store"
    )
    with sv.sweep.processes(2) as executor:
        records = sv.sweep.run(train, points(), store, executor)
    rows = [
        point | {"loss": float(record.loss[-LAST:].mean(skipna=False))}
        for point, record in zip(points(), records, strict=True)
    ]
    pd.DataFrame(rows).to_csv(
        RESULTS / "architectures.csv",
        index=False,
        float_format="%.4g",
        lineterminator="\n",
    )


def losses() -> xr.DataArray:
    """The stored record: (architecture, initialization, learning_rate, seed), NaN where a
    rate was not tried, infinite where a run diverged."""
    runs = pd.read_csv(RESULTS / "architectures.csv")
    keys = ["architecture", "initialization", "learning_rate", "seed"]
    runs["loss"] = runs.loss.fillna(np.inf)
    found: xr.DataArray = runs.set_index(keys).loss.to_xarray()
    return found


def best(losses: xr.DataArray) -> pd.DataFrame:
    """Best rates of every architecture, as :func:`svlib.comparison.best_rates` finds them,
    by architecture and initialization."""
    tables = {
        name: sv.comparison.best_rates(losses.sel(architecture=name))
        for name in ARCHITECTURES
    }
    return pd.concat(tables)


def lines(best: pd.DataFrame) -> list[tuple[str, ...]]:
    """One line per architecture: loss, standard error and rate for every start."""
    texts: dict[Any, str] = {
        row.Index: f"{row.loss:.2f} ± {row.error:.2f} at {row.learning_rate:g}"
        for row in best.itertuples()
    }
    return [
        (name, *(texts[name, start] for start in REPAIRS))
        for name in ARCHITECTURES
    ]


if __name__ == "__main__":
    main()
