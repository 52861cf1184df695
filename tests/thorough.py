"""What only `make verify-all` runs: further cells of a matrix, more examples of a property.

The suite runs some cells of each matrix, and every fourth example of each property test. With
VLMPORT_THOROUGH set, pytest runs the cells that are left out there, and the property tests with all
their examples, newly drawn.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import settings

THOROUGH = bool(os.environ.get("VLMPORT_THOROUGH"))
SHARE = 4  # the suite draws every fourth example


def cells(*values: Any, rest: tuple[Any, ...] = ()) -> list[Any]:
    """Values of a parameter: those of the suite, then those of `make verify-all` alone."""
    return [*values, *(pytest.param(value, marks=pytest.mark.thorough) for value in rest)]


def examples(number: int, **others: Any) -> settings:
    """Return the settings of a property test that draws `number` examples in `make verify-all`."""
    return settings(max_examples=number if THOROUGH else -(-number // SHARE), **others)


def choose(items: list[pytest.Item]) -> list[pytest.Item]:
    """Keep what this run is for, and return the rest."""
    wanted, others = [], []
    for item in items:
        special = item.get_closest_marker("thorough") is not None
        drawn = item.get_closest_marker("hypothesis") is not None
        keep = special or drawn if THOROUGH else not special
        (wanted if keep else others).append(item)
    items[:] = wanted
    return others
