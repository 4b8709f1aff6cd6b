"""What each record says about its making, and files that are written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

import torch


def _code() -> str:
    """The installed version and a digest of the sources that run: ``0.1.0 (3f2a9c01d4e8)``.

    The version alone would let code mix: an editable installation keeps the version that it was
    installed with, and changes that are not committed have none.
    """
    digest = hashlib.sha256()
    room = Path(__file__).parent
    for path in sorted(room.rglob("*.py")):
        content = path.read_bytes().replace(b"\r\n", b"\n")
        digest.update(f"{path.relative_to(room).as_posix()} {len(content)}\n".encode() + content)
    return f"{version('svlib')} ({digest.hexdigest()[:12]})"


CODE = _code()  # now, for the files may change while this process runs


def provenance(device: torch.device, started: float) -> dict[str, str | float]:
    """Versions, device and wall time in seconds since ``started`` (of ``time.perf_counter``)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "svlib": CODE,
        "torch": str(torch.__version__),
        "numpy": version("numpy"),
        "python": platform.python_version(),
        "device": f"{device.type} ({name}, {torch.get_num_threads()} threads)",
        "wall_time": round(time.perf_counter() - started, 3),
    }


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, then rename it: what stood there stays until then.

    Folders that are missing are made.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = f"{error.strerror}; {len(content):,} bytes were to be written"
        raise type(error)(error.errno, reason, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)
