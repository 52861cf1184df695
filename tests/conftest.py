"""A tiny captioner and its bundle, made once for all tests that only look at them."""

from __future__ import annotations

import gc
import os
import shutil
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # as vlmport does, which is imported later

import onnxruntime as ort
import pytest
from hypothesis import settings
from PIL import Image

from tests.checkpoints import write_prefix_checkpoint
from tests.processes import let_children_be_interrupted


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
settings.load_profile("the same each time")


def pytest_collection_finish() -> None:
    """What is imported by now stays: the garbage collector need not go through it at each turn."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder, not to be changed."""
    return write_prefix_checkpoint(tmp_path_factory.mktemp("checkpoint") / "captioner")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bundle in every precision, not to be changed."""
    from vlmport.exporter import export

    out = tmp_path_factory.mktemp("bundle") / "captioner"
    export(tiny_checkpoint, out)
    return out


@pytest.fixture
def own_bundle_folder(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle for a test that breaks it."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "own-bundle"))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A picture that can be read."""
    Image.new("RGB", (40, 30), "red").save(tmp_path / "good.png")
    return tmp_path / "good.png"
