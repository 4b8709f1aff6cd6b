"""What every record says about how it was made, and how files are written: whole or not at all."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

import torch


def provenance(device: torch.device, started: float) -> dict[str, str | float]:
    """Versions, device and wall time in seconds since ``started`` (of ``time.perf_counter``)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "svlib": version("svlib"),
        "torch": str(torch.__version__),
        "numpy": version("numpy"),
        "python": platform.python_version(),
        "device": f"{device.type} ({name}, {torch.get_num_threads()} threads)",
        "wall_time": round(time.perf_counter() - started, 3),
    }


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, then rename it: there is never half a file.

    Raises:
        OSError: If it cannot be written. What stood there before still does.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise type(error)(
            error.errno, f"{error.strerror}; {len(content):,} bytes were to be written", str(path)
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
