"""A tiny captioner and its bundle, made once for all tests that only look at them."""

from __future__ import annotations

import functools
import gc
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # as vlmport does, which is imported later

import onnxruntime as ort
import pytest
from hypothesis import settings
from PIL import Image

from tests import balance, thorough
from tests.checkpoints import write_prefix_checkpoint
from tests.processes import let_children_be_interrupted
from tests.sharing import shared
from vlmport.bundle import SUFFIXES, Bundle


class OneThread(ort.SessionOptions):
    """ONNX Runtime's options with one thread where a test asks for no number."""

    def __init__(self) -> None:
        super().__init__()
        self.intra_op_num_threads = 1


# pytest-xdist has a worker for each core: with more threads each they wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    ort.SessionOptions = OneThread

let_children_be_interrupted()

# The same examples each time, and no limit of time: a run never fails by luck or on a busy machine.
# New examples are drawn by `make verify-all`.
settings.register_profile("the same each time", derandomize=True, deadline=None)
settings.register_profile("new ones", deadline=None)
settings.load_profile("new ones" if thorough.THOROUGH else "the same each time")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return balance.scheduler(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    balance.mark_long(items)
    balance.long_first(items)
    left_out = thorough.choose(items)
    config.hook.pytest_deselected(items=left_out)


def pytest_collection_finish() -> None:
    """What is imported by now stays: the garbage collector need not go through it at each turn."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder, not to be changed."""
    return shared(tmp_path_factory, "checkpoint/captioner", write_prefix_checkpoint)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bundle in the precisions that ship, not to be changed."""
    from vlmport.exporter import export

    make = functools.partial(export, tiny_checkpoint)
    return shared(tmp_path_factory, "bundle/captioner", make)


@pytest.fixture(scope="session")
def built_in(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """Name of a built-in model → its bundle in every precision, not to be changed."""

    def bundle(name: str) -> Bundle:
        from vlmport.exporter import export

        def make(folder: Path) -> None:
            export(name, folder, precisions=tuple(SUFFIXES))

        return Bundle.open(shared(tmp_path_factory, f"built-in/{name}", make))

    return bundle


@pytest.fixture
def own_bundle_folder(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle for a test that breaks it."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "own-bundle"))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A picture that can be read."""
    Image.new("RGB", (40, 30), "red").save(tmp_path / "good.png")
    return tmp_path / "good.png"
