"""Fixtures that more than one file of tests uses."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from interpreter import remember_builtins


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is left out of CI beside what is marked slow.

    On a GPU every new shape, type and stride is a compilation: what brings no new variant of a kernel is slow. Of the
    cases of a test that says `every(n)` all but each n-th are.
    """
    cases: Counter[str] = Counter()
    for item in items:
        if (mark := item.get_closest_marker("every")) and not item.get_closest_marker("gpu"):
            name = item.nodeid.partition("[")[0]
            if cases[name] % mark.args[0]:
                item.add_marker(pytest.mark.slow)
            cases[name] += 1
        if isinstance(item, pytest.Function) and item.get_closest_marker("gpu"):
            for mark in item.iter_markers("few_on_a_gpu"):
                if not any(part in item.callspec.id for part in mark.args):
                    item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    if "triton" in sys.modules:
        remember_builtins()
    _keep_what_is_imported()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    if nextitem is not None and len(sys.modules) > _imported + 200:
        _keep_what_is_imported()


_imported = 0


def _keep_what_is_imported() -> None:
    """What is imported by now stays: no collection of garbage need look through all of it again."""
    global _imported
    _imported = len(sys.modules)
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Wan pipeline in `wan` and a teacher in `dinov2`, of `training_runs.save_models`; a test changes a copy."""
    from training_runs import save_models

    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small tensors are slower on several threads, and much slower where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def nan_in_new_memory() -> Iterator[None]:
    """What a kernel does not write is NaN, not what the last one left there."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
