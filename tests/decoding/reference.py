"""transformers' own `generate`, over a language model that is a table.

The model's logits are a pure function of the new tokens, so that beams that differ get different
ones. All the rest is transformers: its processors, its loops, its stopping criteria. Only where
it draws from torch's random numbers, or leaves the order of equals to chance, it gets ours.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig
from transformers.generation import logits_process
from transformers.generation import utils as generation
from transformers.generation.stopping_criteria import StoppingCriteria
from transformers.modeling_outputs import CausalLMOutput

from vlmport.runtime.decoding.rng import draw, draw_several, stream

OURS = ("seed", "logprobs", "stop_strings", "json_schema", "regex")  # options HF has not


@dataclass(frozen=True)
class Table:
    """A language model: the logits after some new tokens are a row of a table.

    Attributes:
        rows: float32 [R, V].
    """

    rows: np.ndarray

    @property
    def vocab_size(self) -> int:
        return self.rows.shape[1]

    def __call__(self, tokens: Sequence[int]) -> np.ndarray:
        """The logits [V] after these new tokens."""
        place = len(tokens)
        for n, token in enumerate(tokens[-3:]):
            place = place * 31 + (n + 1) * token
        return self.rows[place % len(self.rows)]


class TableModel(torch.nn.Module, GenerationMixin):
    """The table as a model that transformers can generate with, from ids or from embeddings."""

    main_input_name = "input_ids"
    _is_stateful = False

    def __init__(self, table: Table, prompt_length: int):
        super().__init__()
        self.config = PretrainedConfig(vocab_size=table.vocab_size)
        self.generation_config = GenerationConfig()
        self.table, self.prompt_length = table, prompt_length

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def _prepare_cache_for_generation(self, *_: Any, **__: Any) -> None:
        """It has none: it sees all tokens each time."""

    def _optimize_model_for_decode(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        return {"input_ids": input_ids}

    def forward(
        self,
        input_ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutput:
        rows = [self.table(row[self.prompt_length :]) for row in input_ids.tolist()]
        return CausalLMOutput(logits=torch.from_numpy(np.stack(rows))[:, None])


@dataclass(frozen=True)
class Expected:
    """What transformers returns.

    Attributes:
        tokens: the new tokens of each sequence, padding cut off.
        scores: sequences_scores; None without beams.
        totals: the same, before they are divided by a power of the length.
    """

    tokens: list[list[int]]
    scores: list[float] | None = None
    totals: Sequence[float] = ()


def generate(
    table: Table,
    options: Mapping[str, Any],
    *,
    prompt_ids: Sequence[int],
    processors_see_prompt: bool,
    stop_token_ids: Sequence[int],
    pad_token_id: int,
    max_new_tokens: int,
    is_stopped: Callable[[Sequence[int]], bool] | None = None,
    mask: Callable[[Sequence[int]], np.ndarray] | None = None,
) -> Expected:
    """What transformers generates for one request, with our random stream where it draws."""
    start = len(prompt_ids) if processors_see_prompt else 0
    model = TableModel(table, start)
    own = {name: value for name, value in options.items() if name not in OURS}
    own["max_new_tokens"] = max_new_tokens
    if processors_see_prompt:
        own["inputs"] = torch.tensor([list(prompt_ids)])
        own["attention_mask"] = torch.ones_like(own["inputs"])  # else it takes ids for padding
    else:  # a prefix of embeddings: no ids before the new ones
        own["inputs_embeds"] = torch.zeros(1, len(prompt_ids), 4)
        own["attention_mask"] = torch.ones(1, len(prompt_ids), dtype=torch.long)
    if mask is not None:
        own["prefix_allowed_tokens_fn"] = lambda _, ids: np.flatnonzero(
            mask(ids[start:].tolist())
        ).tolist()
    if is_stopped is not None:
        own["stopping_criteria"] = [_Stopped(lambda ids: is_stopped(ids[start:]))]
    with _quiet(), _deterministic(options, stop_token_ids, is_stopped, start):
        out = model.generate(
            **own,
            eos_token_id=list(stop_token_ids),
            pad_token_id=pad_token_id,
            return_dict_in_generate=True,
            output_scores=True,
        )
    sequences = [row[start:] for row in out.sequences.tolist()]
    if "beam_indices" in out:
        lengths = [(row >= 0).sum() for row in out.beam_indices]
        cut = [row[:length] for row, length in zip(sequences, lengths, strict=True)]
        scores, power = out.sequences_scores.tolist(), options.get("length_penalty", 1.0)
        totals = [one * max(len(row), 1) ** power for one, row in zip(scores, cut, strict=True)]
        return Expected(cut, scores, totals)
    return Expected([_cut(row, stop_token_ids, is_stopped) for row in sequences])


def _cut(
    row: list[int], stops: Sequence[int], is_stopped: Callable[[Sequence[int]], bool] | None
) -> list[int]:
    """Up to where it stopped; padding follows."""
    for at, token in enumerate(row):
        if token in stops or (is_stopped and is_stopped(row[: at + 1])):
            return row[: at + 1]
    return row


class _Stopped(StoppingCriteria):
    def __init__(self, is_stopped: Callable[[Sequence[int]], bool]):
        self.is_stopped = is_stopped

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.tensor([self.is_stopped(row) for row in input_ids.tolist()])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers warns of options that it ignores here; those are compared too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _deterministic(
    options: Mapping[str, Any],
    stops: Sequence[int],
    is_stopped: Callable[[Sequence[int]], bool] | None,
    start: int,
) -> Iterator[None]:
    """Our stream in the place of torch.multinomial, and equals in the order of their indices."""
    drawn = _Draws(options, stops, is_stopped, start)
    functional = SimpleNamespace(
        **{name: getattr(torch.nn.functional, name) for name in ("log_softmax", "pad")},
        softmax=drawn.softmax,
    )
    with (
        mock.patch.object(torch, "multinomial", drawn.multinomial),
        mock.patch.object(generation, "nn", SimpleNamespace(functional=functional)),
        mock.patch.object(torch, "topk", _topk),
        mock.patch.object(logits_process.torch, "sort", _sort),
    ):
        yield


class _Draws:
    """Draws from our stream what transformers would draw from torch's."""

    def __init__(
        self,
        options: Mapping[str, Any],
        stops: Sequence[int],
        is_stopped: Callable[[Sequence[int]], bool] | None,
        start: int,
    ):
        seed, self.stops, self.is_stopped = options.get("seed"), stops, is_stopped
        beams = options.get("num_beams", 1)
        count = 1 if beams > 1 else options.get("num_return_sequences", 1)
        self.states = [None if seed is None else stream(seed, n) for n in range(count)]
        self.rows: list[list[int]] = [[] for _ in range(count)]

    def softmax(self, scores: torch.Tensor, dim: int) -> torch.Tensor:
        self.scores = scores.numpy().copy()  # what the draw that follows is made from
        return torch.softmax(scores, dim=dim)

    def multinomial(self, probabilities: torch.Tensor, num_samples: int) -> torch.Tensor:
        assert len(probabilities) == len(self.states)
        if num_samples > 1:  # beams: one request, all its beams in a row
            chosen, self.states[0] = draw_several(self.scores[0], num_samples, self.states[0])
            return torch.tensor([chosen])
        tokens = [self._one(n) for n in range(len(self.states))]
        return torch.tensor(tokens)[:, None]

    def _one(self, n: int) -> int:
        row = self.rows[n]
        if row and (row[-1] in self.stops or (self.is_stopped and self.is_stopped(row))):
            return 0  # finished: transformers puts padding here
        token, self.states[n] = draw(self.scores[n], self.states[n])
        row.append(token)
        return token


def _topk(values: torch.Tensor, k: int, dim: int = -1, **_: Any) -> Any:
    """torch.topk, but equals come in the order of their indices."""
    order = torch.argsort(values, dim=dim, descending=True, stable=True)[..., :k]
    return torch.return_types.topk((values.gather(dim, order), order))


def _sort(values: torch.Tensor, dim: int = -1, descending: bool = False) -> Any:
    """torch.sort from the least on, but the lowest of equal indices counts as the better.

    The better ones are the last for top_p, which sorts scores, and the first for typical_p.
    """
    assert not descending
    caller = sys._getframe(1).f_code.co_qualname
    assert caller in ("TopPLogitsWarper.__call__", "TypicalLogitsWarper.__call__")
    order = torch.argsort(values, dim=dim, descending=caller.startswith("TopP"), stable=True)
    if caller.startswith("TopP"):
        order = order.flip(dim)
    return torch.return_types.sort((values.gather(dim, order), order))
