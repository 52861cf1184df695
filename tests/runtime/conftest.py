from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.idefics3_checkpoints import write_idefics3_checkpoint
from tests.runtime import toy
from tests.runtime.talking import Work
from vlmport.bundle import Bundle
from vlmport.exporter import export
from vlmport.runtime.graphs.cache import KeyValueCache
from vlmport.runtime.graphs.components import VISION, Components
from vlmport.runtime.model import VLM


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The toy bundle, not to be changed."""
    return toy.write_bundle(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def own_bundle(tmp_path: Path) -> Callable[..., Bundle]:
    """Writes a toy bundle for one test, which may break it."""
    return lambda **settings: toy.write_bundle(tmp_path / "toy", **settings)


@pytest.fixture
def components(bundle: Bundle) -> Components:
    return Components.open(bundle, threads=1)


@pytest.fixture
def vlm(bundle: Bundle) -> VLM:
    return VLM.open(bundle, threads=1)


@pytest.fixture(scope="session")
def long_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The toy with room for some turns."""
    return toy.write_bundle(tmp_path_factory.mktemp("toy"), context=600)


@pytest.fixture(scope="session")
def tiled_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Idefics3, not to be changed."""
    return write_idefics3_checkpoint(tmp_path_factory.mktemp("idefics3") / "checkpoint")


@pytest.fixture(scope="session")
def tiled_bundle(tiled_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export(tiled_checkpoint, tmp_path_factory.mktemp("idefics3") / "b", precisions="fp32,q8")


@pytest.fixture
def tiled(tiled_bundle: Bundle) -> VLM:
    """A tiny Idefics3: pictures of many tiles."""
    return VLM.open(tiled_bundle, precision="fp32", threads=1)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    work = Work()
    session, prefill = Components.session, KeyValueCache.prefill

    class Counted:
        def __init__(self, inner: Any):
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def run(self, *args: Any) -> Any:
            work.tiles += 1
            return self.inner.run(*args)

    def counted(self: Components, component: str) -> Any:
        found = session(self, component)
        return Counted(found) if component == VISION else found

    def counted_prefill(self: KeyValueCache, row: int, embeds: np.ndarray, *args: Any, **k: Any):
        work.prefilled.append(len(embeds))
        return prefill(self, row, embeds, *args, **k)

    monkeypatch.setattr(Components, "session", counted)
    monkeypatch.setattr(KeyValueCache, "prefill", counted_prefill)
    return work
