"""What the suite leaves out is what `make verify-all` runs, and nothing falls between them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests import thorough
from tests.thorough import cells, choose, examples


def item(name: str, *marks: str) -> Any:
    """A collected test with these marks."""
    return SimpleNamespace(name=name, get_closest_marker=dict.fromkeys(marks, "a mark").get)


def kept(monkeypatch: pytest.MonkeyPatch, in_verify_all: bool) -> set[str]:
    monkeypatch.setattr(thorough, "THOROUGH", in_verify_all)
    items = [item("plain"), item("cell", "thorough"), item("property", "hypothesis")]
    names = {one.name for one in items}
    left_out = choose(cast(list[pytest.Item], items))
    assert {one.name for one in [*items, *left_out]} == names
    return {one.name for one in items}


def test_each_test_is_run_by_one_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept(monkeypatch, False) == {"plain", "property"}
    assert kept(monkeypatch, True) == {"cell", "property"}


def test_cells_keep_their_order_and_only_the_rest_is_marked() -> None:
    first, second, third = cells("a", "b", rest=("c",))
    assert (first, second) == ("a", "b")
    assert third.values == ("c",)
    assert [mark.name for mark in third.marks] == ["thorough"]


def test_a_property_draws_fewer_examples_in_the_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thorough, "THOROUGH", False)
    assert examples(300, deadline=None).max_examples == 75
    assert examples(1).max_examples == 1
    monkeypatch.setattr(thorough, "THOROUGH", True)
    assert examples(300).max_examples == 300
