"""Checkpoints to read and tables to write, for the command line."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from svlib._files import write_whole

TABLES = (".csv", ".json", ".parquet", ".feather")
_WRAPPED = ("state_dict", "model_state_dict", "model")  # Lightning and usual training loops
_PREFIXES = ("module.", "_orig_mod.", "model.")  # DataParallel, torch.compile, Lightning


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load a state dictionary, also one that a training loop has wrapped.

    Raises:
        ValueError: If it holds none, or its names are not those of the model.
    """
    if not path.stat().st_size:
        raise ValueError(f"--checkpoint must hold a state dictionary, got {path}, empty")
    state: Any = torch.load(path, map_location="cpu", weights_only=True)
    wanted = set(model.state_dict())
    for key in _WRAPPED:
        if isinstance(state, Mapping) and key in state and isinstance(state[key], Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"--checkpoint must hold a state dictionary, got {type(state).__name__}")
    state = {str(name): value for name, value in state.items()}
    for prefix in _PREFIXES * 2:  # in either order
        if not wanted & set(state) and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    missing, unknown = sorted(wanted - set(state)), sorted(set(state) - wanted)
    if missing or unknown:
        pairs = (("missing", missing), ("unknown", unknown))
        told = [f"{len(x)} {what} ({x[0]}, ...)" for what, x in pairs if x]
        raise ValueError(f"--checkpoint must have the model's names, got {' and '.join(told)}")
    model.load_state_dict(state)


def check_table(path: Path | None) -> None:
    """Raise ValueError unless a table can be written to a file of this name."""
    if path is not None and path.suffix.lower() not in TABLES:
        raise ValueError(f"--table must end in one of {', '.join(TABLES)}, got {path}")


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table in the form that the file's name asks for; shapes become lists."""
    table = table.assign(shape=table["shape"].map(list))
    kind, content = path.suffix.lower(), io.BytesIO()
    if kind == ".csv":
        table.to_csv(content, index=False)
    elif kind == ".json":
        table.to_json(content, orient="records", double_precision=15)
    elif kind == ".parquet":
        table.to_parquet(content)
    else:
        table.to_feather(content)
    write_whole(path, content.getvalue())
