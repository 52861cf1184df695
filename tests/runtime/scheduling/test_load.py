"""Many clients: how long a prompt holds up the others, and what is left when all are gone."""

from __future__ import annotations

import gc
import itertools
import random
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runtime import toy
from tests.runtime.scheduling.asking import WAIT, facts, question
from vlmport.bundle import Bundle
from vlmport.errors import ServerError
from vlmport.runtime.graphs.cache import CHUNK, KeyValueCache
from vlmport.runtime.model import VLM
from vlmport.runtime.scheduling import Job, Piece, Scheduler
from vlmport.runtime.scheduling.engine import BESIDE


class Calls:
    """The decoder's calls in order: tokens of a chunk of a prompt, or 0 for a step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.sizes: list[int] = []
        append, step = KeyValueCache._append, KeyValueCache.step

        def noted(cache: KeyValueCache, row: int, past: int, embeds: Any, *more: Any) -> Any:
            self.sizes.append(len(embeds))
            return append(cache, row, past, embeds, *more)

        def stepped(cache: KeyValueCache, embeds: Any) -> Any:
            self.sizes.append(0)
            return step(cache, embeds)

        monkeypatch.setattr(KeyValueCache, "_append", noted)
        monkeypatch.setattr(KeyValueCache, "step", stepped)

    def between_steps(self) -> list[int]:
        """Tokens of prompts that ran between two steps, from the first step to the last one."""
        steps = [at for at, size in enumerate(self.sizes) if size == 0]
        return [sum(self.sizes[a:b]) for a, b in itertools.pairwise(steps)]


@pytest.fixture(scope="session")
def wide_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The toy with room for long prompts."""
    return toy.write_bundle(tmp_path_factory.mktemp("toy"), context=4000)


@pytest.mark.parametrize("by_call", [False, True])
def test_a_long_prompt_holds_up_a_stream_by_one_chunk(
    wide_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, by_call: bool
) -> None:
    with VLM.open(wide_bundle, threads=1) as model:
        decoder = type(model.components.decoder)
        monkeypatch.setattr(decoder, "rounds_by_call", by_call)
        options: Any = {"max_new_tokens": 300, "min_new_tokens": 300}
        want = [model.generate(question("or " * n), max_new_tokens=3) for n in (900, 20, 30, 901)]
        calls = Calls(monkeypatch)
        with Scheduler(model, cache_bytes=0) as scheduler:
            stream = scheduler.submit(question(), **options)
            assert isinstance(next(stream.events(WAIT)), Piece)
            long = [
                scheduler.submit(question("or " * n), max_new_tokens=3) for n in (900, 20, 30, 901)
            ]
            assert [facts(job.result(WAIT)) for job in long] == [facts(one) for one in want]
            assert not stream.finished
            stream.cancel()
        waits = calls.between_steps()
        most = CHUNK + CHUNK // 2 - 1 if by_call else BESIDE
        assert max(waits) <= most
        prompts = sum(job.prompt_tokens for job in long)
        assert sum(waits) == prompts
        assert sum(tokens > 0 for tokens in waits) >= prompts / most


def test_alone_a_prompt_runs_in_whole_chunks(
    wide_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with VLM.open(wide_bundle, threads=1) as model:
        calls = Calls(monkeypatch)
        with Scheduler(model) as scheduler:
            job = scheduler.submit(question("or " * 300), max_new_tokens=1)
            job.result(WAIT)
        assert len(calls.sizes) == len(range(0, job.prompt_tokens - CHUNK // 2, CHUNK))
        assert sum(calls.sizes) == job.prompt_tokens


@pytest.mark.parametrize("precision", ["fp32", "q4"])
def test_no_chunk_has_one_token(
    built_in: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """A token alone in its call has other last bits; in chunks of 2 to 5 all numbers are equal."""
    monkeypatch.setattr("vlmport.runtime.scheduling.engine.BESIDE", 4)
    image = toy.picture(1, 40, 60)
    options: Any = {"max_new_tokens": 2, "logprobs": 3}
    with VLM.open(built_in("shapes-smolvlm"), precision=precision, threads=1) as model:
        asked = [question("what is it? " + "a " * n, 1) for n in range(1, 5)]
        want = [facts(model.generate(one, [image], **options)) for one in asked]
        with Scheduler(model, cache_bytes=0) as scheduler:
            stream = scheduler.submit(question(), max_new_tokens=500, min_new_tokens=500)
            assert isinstance(next(stream.events(WAIT)), Piece)
            calls = Calls(monkeypatch)
            jobs = [scheduler.submit(one, [image], **options) for one in asked]
            assert [facts(job.result(WAIT)) for job in jobs] == want
            assert not stream.finished
            stream.cancel()
        sizes = [size for size in calls.sizes if size]
        assert {2, 4} <= set(sizes) <= {2, 3, 4}


def test_rows_run_together_as_far_as_there_is_memory(
    model: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    let, step = threading.Event(), KeyValueCache.step

    def held(cache: KeyValueCache, embeds: Any) -> Any:
        assert let.wait(WAIT)
        return step(cache, embeds)

    monkeypatch.setattr(KeyValueCache, "step", held)
    token = model.components.decoder.token_bytes
    for rows, room in ((1, 0), (1, 100), (2, 130), (4, 1 << 20)):
        let.clear()
        with Scheduler(model, running_bytes=room * token) as scheduler:
            jobs = [
                scheduler.submit(question(), max_new_tokens=40, min_new_tokens=40) for _ in range(4)
            ]
            let.set()
            tokens = [len(job.result(WAIT).token_ids) for job in jobs]
            assert tokens == [40] * 4
            assert scheduler.stats().max_rows == rows
            assert 50 < jobs[0].prompt_tokens + 40 < 65


def test_clients_that_vanish_leave_nothing_behind(model: VLM) -> None:
    """Jobs that are cancelled at any time, or that nobody reads, and whose callers forget them."""
    rng, threads = random.Random(0), threading.active_count()
    pictures = [toy.picture(n, 16, 16) for n in range(20)]
    with Scheduler(model, max_queue=1000, cache_bytes=100_000) as scheduler:
        left: list[weakref.ref[Job]] = []
        for n in range(400):
            images = [rng.choice(pictures)] if n % 2 else []
            options: Any = {"do_sample": True, "num_return_sequences": 3} if n % 5 == 0 else {}
            job = scheduler.submit(
                question("or " * rng.choice([1, 10, 60]), len(images)),
                images,
                max_new_tokens=rng.choice([1, 20, 200]),
                **options,
            )
            if n % 3 == 0:
                next(job.events(WAIT))
            if n % 7:
                job.cancel()
            left.append(weakref.ref(job))
            del job
        wait_until(lambda: not scheduler.stats().submitted - sum(scheduler.stats().ended.values()))
        wait_until(lambda: scheduler.stats().running_bytes == 0)
        stats = scheduler.stats()
        assert (stats.waiting, stats.prefilling, stats.running_rows) == (0, 0, 0)
        assert stats.ended["cancelled"] > 100
        assert stats.cache_bytes <= 100_000
        wait_until(lambda: gc.collect() >= 0 and not any(job() for job in left))
        want = model.generate(question(), max_new_tokens=20)
        assert facts(scheduler.submit(question(), max_new_tokens=20).result(WAIT)) == facts(want)
    assert threading.active_count() == threads


def wait_until(holds: Callable[[], bool]) -> None:
    for _ in range(WAIT * 100):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("it never holds")


def test_many_threads_submit_and_cancel(model: VLM) -> None:
    want = facts(model.generate(question("or or"), max_new_tokens=8))
    wrong: list[Any] = []

    def client(scheduler: Scheduler, number: int) -> None:
        rng = random.Random(number)
        for _ in range(15):
            try:
                job = scheduler.submit(question("or or"), max_new_tokens=8)
            except ServerError as error:
                if error.code != "server.queue-full":
                    wrong.append(error)
                continue
            if rng.random() < 0.3:
                job.cancel()
            ended = list(job.events(WAIT))[-1]
            if job.reason == "finished" and facts(ended.response) != want:  # type: ignore[union-attr,arg-type]
                wrong.append(ended)

    with Scheduler(model, max_running=3, max_queue=4) as scheduler:
        clients = [threading.Thread(target=client, args=(scheduler, n)) for n in range(12)]
        for one in clients:
            one.start()
        for one in clients:
            one.join(WAIT)
        assert wrong == []
        stats = scheduler.stats()
        assert sum(stats.ended.values()) == stats.submitted
        assert stats.submitted + stats.refused == 12 * 15


def resident() -> int:
    """Memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.thorough
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_ten_thousand_requests_grow_no_memory(model: VLM) -> None:
    rng = np.random.default_rng(0)
    with Scheduler(model, max_queue=100, cache_bytes=1 << 20) as scheduler:
        sizes = []
        for _ in range(100):
            jobs = [
                scheduler.submit(
                    question("or " * int(rng.integers(1, 60)), 1),
                    [toy.picture(int(rng.integers(1000)), 16, 16)],
                    max_new_tokens=8,
                )
                for _ in range(100)
            ]
            for job in jobs:
                job.result(WAIT)
            sizes.append(resident())
        assert scheduler.stats().ended == {"finished": 10_000}
        assert scheduler.stats().cache_bytes <= 1 << 20
    early, late = np.median(sizes[20:40]), np.median(sizes[80:])
    assert late - early < 8 << 20, [size >> 20 for size in sizes]
