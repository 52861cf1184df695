"""Our side: run a search over a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.decoding.reference import Expected, Table, generate
from vlmport.runtime.decoding import new_search
from vlmport.runtime.decoding.beams import BeamSearch
from vlmport.runtime.decoding.options import GenerationOptions
from vlmport.runtime.decoding.search import IndependentSearch, Search

IDLE = -5e8  # a sum that stands for "none": transformers fills its answers up with such


@dataclass(frozen=True)
class Request:
    """One request, as both sides take it."""

    options: Mapping[str, Any]
    prompt_ids: Sequence[int] = (1, 2, 3, 2)
    processors_see_prompt: bool = True
    stop_token_ids: Sequence[int] = (0,)
    pad_token_id: int = 0  # of transformers alone
    max_new_tokens: int = 10
    is_stopped: Callable[[Sequence[int]], bool] | None = None
    mask: Callable[[Sequence[int]], np.ndarray] | None = None

    @property
    def rest(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "options"}

    def search(self, table: Table) -> Search:
        options = GenerationOptions.of(self.options)
        rest = {name: value for name, value in self.rest.items() if name != "pad_token_id"}
        return new_search(options, vocab_size=table.vocab_size, **rest)

    def expected(self, table: Table) -> Expected:
        return generate(table, self.options, **self.rest)


def rows_of(search: Search) -> tuple[tuple[int, ...], ...]:
    """The new tokens of each row of the last choice, as the search itself has them."""
    if isinstance(search, BeamSearch):
        return () if search.done else tuple(beam.tokens for beam in search._state.running)
    assert isinstance(search, IndependentSearch)
    return tuple(search._state.sequences[one].tokens for one in search._state.going)


def logits_for(table: Table, search: Search) -> np.ndarray:
    """The rows that a search asks for next."""
    rows = rows_of(search) if search.steps else [()]
    return np.stack([table(tokens) for tokens in rows])


def run(search: Search, table: Table) -> Search:
    """To the end. Says where a choice does not fit what the search says of its rows."""
    before: Sequence[tuple[int, ...]] = [()]
    while not search.done:
        choice = search.choose(logits_for(table, search))
        assert len(choice.tokens) == len(choice.parents) == len(rows_of(search)) <= search.rows
        for token, parent, tokens in zip(
            choice.tokens, choice.parents, rows_of(search), strict=True
        ):
            assert tokens == (*before[parent], token)
        before = rows_of(search)
    return search


def assert_equal(search: Search, expected: Expected) -> None:
    """Token for token; scores within float32's sums."""
    found = search.results()
    if expected.scores is None:
        assert [list(one.tokens) for one in found] == expected.tokens
        assert all(one.score is None for one in found)
        return
    real = [n for n, total in enumerate(expected.totals) if total > IDLE]
    if not real:  # remove_invalid_values lets what is forbidden come, where all is
        assert len(found) == 1
        return
    assert [list(one.tokens) for one in found] == [expected.tokens[n] for n in real]
    np.testing.assert_allclose(
        [one.score for one in found], [expected.scores[n] for n in real], rtol=2e-5, atol=2e-5
    )


def compare(request: Request, table: Table) -> Search:
    """Run both, and hold ours against transformers'."""
    search = run(request.search(table), table)
    try:
        expected = request.expected(table)
    except ValueError as error:
        # torch's Categorical, of which eta_cutoff and top_h take the entropy, refuses them too.
        if "distribution Categorical" not in str(error):
            raise
        assert_goes_around_nothing(request, search, ("eta_cutoff", "top_h"))
        return search
    if np.isnan(expected.totals).any():
        # torch's log_softmax of a beam that may go nowhere is NaN, which counts as the best there.
        assert_goes_around_nothing(request, search, ("renormalize_logits",))
        return search
    assert_equal(search, expected)
    return search


def assert_goes_around_nothing(request: Request, search: Search, options: Sequence[str]) -> None:
    """Where transformers fails at a beam that may go nowhere, by one of these options, ours ends
    that beam and goes on with others."""
    assert set(options) & request.options.keys()
    found = search.results()
    assert found
    assert all(one.score is not None and one.score > IDLE for one in found)
