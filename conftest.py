"""Settings for ``pytest`` from any folder.

nbval compares outputs after replacing the parts that differ between machines.
"""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    # an option in pyproject.toml would be a path relative to the folder pytest is called from
    if config.pluginmanager.hasplugin("nbval"):
        config.option.nbval_sanitize_with = config.option.nbval_sanitize_with or str(
            ROOT / "tests/nbval-sanitize.cfg"
        )
