"""What every record says about how it was made."""

from __future__ import annotations

import platform
import time
from importlib.metadata import version

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
