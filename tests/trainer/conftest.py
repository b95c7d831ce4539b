"""A run with checkpoints, as the two files of tests about checkpoints take it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from training_runs import tiny_config, tiny_settings, train


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run with the settings RUN of the test's file."""
    output = tmp_path_factory.mktemp("trained") / "run"
    train(tiny_settings(models, output, **request.module.RUN), tiny_config(models))
    return output


@pytest.fixture
def output(trained: Path, tmp_path: Path) -> Path:
    """A copy of ``trained`` to change."""
    return shutil.copytree(trained, tmp_path / "run")
