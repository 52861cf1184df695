from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runtime import toy
from vlmport.bundle import Bundle
from vlmport.runtime.components import Components
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
