"""SimpleTuner's published wheel, and its classes as they were after every test."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from benches.simpletuner import module, wheel
from crepa_kernels.integrations import simpletuner


@pytest.fixture(scope="session")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the wheel is kept for the next run, where pytest keeps anything."""
    cache = getattr(request.config, "cache", None)
    return tmp_path_factory.mktemp("simpletuner") if cache is None else Path(cache.mkdir("simpletuner"))


@pytest.fixture(scope="session")
def theirs(folder: Path) -> ModuleType:
    try:
        return module(wheel(folder))
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    simpletuner.restore()
