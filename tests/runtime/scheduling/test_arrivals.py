"""Requests that come, go and end at random: each has the tokens that it has alone."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tests.errors import raises
from tests.runtime import toy
from tests.runtime.scheduling.asking import WAIT, check_pieces, facts, question
from tests.thorough import THOROUGH, cells
from vlmport.bundle import SUFFIXES, Bundle
from vlmport.errors import ServerError
from vlmport.runtime.model import VLM
from vlmport.runtime.scheduling import Job, Scheduler

# `generate` warns of an answer that was cut before its grammar ended; a job's `complete` says it.
pytestmark = pytest.mark.filterwarnings("ignore::vlmport.errors.AnswerWarning")
OPTIONS: list[dict[str, Any]] = [
    {},
    {"max_new_tokens": 1},
    {"max_new_tokens": 40, "min_new_tokens": 20},
    {"num_beams": 3},
    {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
    {"num_beams": 2, "do_sample": True, "seed": 5, "temperature": 1.5},
    {"do_sample": True, "seed": 7, "temperature": 1.5, "num_return_sequences": 3},
    {"do_sample": True, "seed": 8, "top_p": 0.9, "logprobs": 2},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "logprobs": 0},
    {"regex": "( [b-d]){2,6}"},
    {"json_schema": {"type": "object", "properties": {"a": {"type": "boolean"}}}},
    {"stop_strings": ["e", "or"]},
    {"prompt_lookup_num_tokens": 5, "max_new_tokens": 30},
]


@dataclass(frozen=True)
class Asked:
    """A request."""

    text: str
    images: tuple[np.ndarray, ...]
    options: dict[str, Any]

    def of(self, ask: Callable[..., Any]) -> Any:
        return ask(question(self.text, len(self.images)), list(self.images), **self.options)


def draw(rng: random.Random, pictures: list[np.ndarray], options: list[dict[str, Any]]) -> Asked:
    words = rng.choice([1, 2, 3, 10, 40, 150])
    shared = "or a " * rng.choice([0, 0, 20, 100])
    text = shared + " ".join(rng.choice(["or", "a", "b"]) for _ in range(words))
    images = tuple(rng.sample(pictures, rng.choice([0, 1, 1, 2])))
    return Asked(text, images, rng.choice(options))


def drive(
    model: VLM, rng: random.Random, asked: list[Asked], cache_bytes: int = 1 << 24, **settings: Any
) -> None:
    """Submit requests at random times, cancel some, and compare the others with `generate`."""
    want = [facts(one.of(model.generate)) for one in asked]
    with Scheduler(model, cache_bytes=cache_bytes, **settings) as scheduler:
        jobs: list[tuple[Job, bool]] = []
        for one in asked:
            jobs.append((one.of(scheduler.submit), rng.random() < 0.2))
            time.sleep(rng.choice([0, 0, 0.001, 0.01]))
            for job, goes in jobs:
                if goes and rng.random() < 0.3:
                    job.cancel()
        for (job, goes), expected in zip(jobs, want, strict=True):
            if goes:
                job.cancel()
            assert list(job.events(WAIT))[-1] == job.ended
            if job.reason == "cancelled":
                assert goes
                with raises(ServerError, "server.cancelled"):
                    job.result()
            else:
                assert facts(job.result()) == expected
                check_pieces(job)
        stats = scheduler.stats()
        assert 0 < stats.cache_bytes <= cache_bytes
        assert (stats.waiting, stats.prefilling, stats.running, stats.running_rows) == (0,) * 4
        assert sum(stats.ended.values()) == len(asked)
        assert stats.max_rows <= scheduler.max_running
        for _ in range(1000):
            if scheduler.stats().running_bytes == 0:
                break
            time.sleep(0.01)
        assert scheduler.stats().running_bytes == 0


@pytest.mark.parametrize("seed", cells(*range(3), rest=tuple(range(3, 43))))
@pytest.mark.parametrize("axes", [2, 3])
def test_each_has_the_tokens_that_it_has_alone(
    own_bundle: Callable[..., Bundle], seed: int, axes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmport.runtime.graphs.cache.CHUNK", 16)
    monkeypatch.setattr("vlmport.runtime.scheduling.engine.CHUNK", 16)
    rng = random.Random(seed)
    pictures = [toy.picture(n, *rng.choice([(8, 8), (12, 16), (20, 24)])) for n in range(4)]
    bundle = own_bundle(context=1200, positions_rank=axes)
    with VLM.open(bundle, threads=1) as model:
        asked = [draw(rng, pictures, OPTIONS) for _ in range(40)]
        size = rng.choice([1 << 14, 1 << 16, 1 << 24])
        drive(model, rng, asked, size, max_running=rng.choice([4, 7, 16]), max_queue=100)


@pytest.mark.parametrize("precision", SUFFIXES)
@pytest.mark.parametrize(
    "name", cells("shapes-smolvlm", rest=("shapes-qwen2.5-vl", "shapes-qwen3-vl"))
)
def test_at_each_precision(built_in: Callable[[str], Bundle], name: str, precision: str) -> None:
    rng = random.Random(precision)
    pictures = [toy.picture(n, 40, 60) for n in range(3)]
    with VLM.open(built_in(name), precision=precision, threads=1) as model:
        options = OPTIONS
        if model.components.decoder.row_by_row or "16" in precision:
            options = [one for one in OPTIONS if "prompt_lookup_num_tokens" not in one]
        asked = [draw(rng, pictures, options) for _ in range(40 if THOROUGH else 12)]
        drive(model, rng, asked, max_running=8, max_queue=100)
