from __future__ import annotations

from collections.abc import Iterator

import pytest

from vlmport.bundle import Bundle
from vlmport.runtime.model import VLM
from vlmport.runtime.scheduling import Scheduler


@pytest.fixture
def model(long_bundle: Bundle) -> Iterator[VLM]:
    with VLM.open(long_bundle, threads=1) as model:
        yield model


@pytest.fixture
def scheduler(model: VLM) -> Iterator[Scheduler]:
    with Scheduler(model) as scheduler:
        yield scheduler
