"""Jobs: their events, results, errors and ends."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.errors import raises
from tests.runtime import toy
from tests.runtime.scheduling.asking import WAIT, check_pieces, facts, pieces, question
from vlmport.errors import ImageError, OptionError, PromptError, ServerError
from vlmport.runtime.graphs.cache import KeyValueCache
from vlmport.runtime.images.features import FeatureCache
from vlmport.runtime.model import VLM
from vlmport.runtime.scheduling import Event, Finished, Piece, Scheduler

LONG = 400


class Gate:
    """Holds the steps of the decoder until it is opened, and counts them."""

    def __init__(self) -> None:
        self.open, self.steps, self.waits = threading.Event(), 0, threading.Event()

    def step(self) -> None:
        self.waits.set()
        assert self.open.wait(WAIT)
        self.steps += 1


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate, original = Gate(), KeyValueCache.step

    def step(self: KeyValueCache, embeds: Any) -> Any:
        gate.step()
        return original(self, embeds)

    monkeypatch.setattr(KeyValueCache, "step", step)
    yield gate
    gate.open.set()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True, "seed": 4},
        {"do_sample": True, "seed": 3, "num_return_sequences": 3, "temperature": 2.0},
        {"logprobs": 2, "max_new_tokens": 5},
        {"logprobs": 1, "do_sample": True, "seed": 1, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 4, "max_new_tokens": 40},
        {"regex": " [b-d]{4}"},
        {"repetition_penalty": 1.5, "min_new_tokens": 8},
    ],
    ids=str,
)
def test_a_job_gives_what_generate_gives(
    model: VLM, scheduler: Scheduler, options: dict[str, Any]
) -> None:
    image = toy.picture(1)
    want = model.generate(question(images=1), [image], **options)
    job = scheduler.submit(question(images=1), [image], **options)
    assert facts(job.result(WAIT)) == facts(want)
    assert job.result().seed == want.seed
    assert job.reason == "finished"
    assert job.finished
    assert not job.cancelled
    check_pieces(job)


def test_a_stop_string_is_never_streamed(model: VLM, scheduler: Scheduler) -> None:
    text = model.generate(question(), max_new_tokens=30).text
    for size in (1, 2, 3, 5):
        stop = text[8 : 8 + size]
        want = model.generate(question(), max_new_tokens=30, stop_strings=[stop])
        job = scheduler.submit(question(), max_new_tokens=30, stop_strings=[stop])
        assert facts(job.result(WAIT)) == facts(want)
        assert stop not in "".join(piece.text for piece in pieces(job))
        check_pieces(job)


def test_counts_and_times(model: VLM, scheduler: Scheduler) -> None:
    before = time.monotonic()
    job = scheduler.submit(question("or or", 2), [toy.picture(1), toy.picture(2)])
    response = job.result(WAIT)
    want = model.generate(question("or or", 2), [toy.picture(1), toy.picture(2)])
    assert response.counts == want.counts
    assert response.timings.keys() == want.timings.keys()
    assert job.prompt_tokens == want.counts["prompt_tokens"]
    assert job.image_tokens == want.counts["image_tokens"] == 24
    times = job.times
    order = [before, times.queued, times.started, times.first_token, times.last_token, times.ended]
    assert order == sorted(order)  # pyright: ignore[reportArgumentType]
    assert [piece.at for piece in pieces(job)] == sorted(piece.at for piece in pieces(job))
    stats = scheduler.stats()
    assert stats.prompt_tokens == stats.prefill_tokens == job.prompt_tokens
    assert stats.decode_tokens == len(response.token_ids) == stats.steps + 1
    assert (stats.submitted, stats.ended, stats.max_rows) == (1, {"finished": 1}, 1)
    assert stats.images == stats.images_encoded == 2
    assert stats.cache_bytes > 0
    assert (stats.waiting, stats.prefilling, stats.running, stats.running_rows) == (0, 0, 0, 0)


def test_several_readers_get_the_same_events(scheduler: Scheduler) -> None:
    job = scheduler.submit(question(), max_new_tokens=20)
    called: list[Event] = []
    job.on_event(called.append)

    async def read() -> list[Event]:
        return [event async for event in job.stream()]

    streamed = asyncio.run(read())
    assert streamed == list(job.events(WAIT)) == called
    late: list[Event] = []
    remove = job.on_event(late.append)
    assert late == called
    remove()
    remove()


def test_a_callback_can_be_removed(scheduler: Scheduler, gate: Gate) -> None:
    job = scheduler.submit(question())
    assert gate.waits.wait(WAIT)
    called: list[Event] = []
    remove = job.on_event(called.append)
    before = len(called)
    remove()
    gate.open.set()
    job.result(WAIT)
    assert len(called) == before


def test_a_reader_that_fails_cancels_the_job(scheduler: Scheduler, gate: Gate) -> None:
    job, other = (scheduler.submit(question(), max_new_tokens=LONG) for _ in range(2))
    assert gate.waits.wait(WAIT)

    def gone(event: Event) -> None:
        raise RuntimeError("Event loop is closed")

    with pytest.raises(RuntimeError, match="closed"):
        job.on_event(gone)  # the first piece is there: it is called at once
    job._callbacks.append(gone)
    gate.open.set()
    with raises(ServerError, "server.cancelled"):
        job.result(WAIT)
    assert len(other.result(WAIT).token_ids) > 1


def test_a_stream_that_is_closed_leaves_the_job(scheduler: Scheduler) -> None:
    job = scheduler.submit(question(), max_new_tokens=30)

    async def first() -> Event:
        stream = job.stream()
        event = await anext(stream)
        await stream.aclose()
        return event

    assert asyncio.run(first()) == next(job.events(WAIT))
    job.result(WAIT)
    assert job.reason == "finished"
    assert not job._callbacks


def test_cancelling_frees_the_row_at_the_next_step(scheduler: Scheduler, gate: Gate) -> None:
    job = scheduler.submit(question(), max_new_tokens=LONG, min_new_tokens=LONG)
    assert gate.waits.wait(WAIT)
    job.cancel()
    gate.open.set()
    with raises(ServerError, "server.cancelled"):
        job.result(WAIT)
    assert job.cancelled
    assert job.reason == "cancelled"
    assert gate.steps <= 1
    *_, last = job.events()
    assert isinstance(last, Finished)
    assert last.response is not None
    assert 1 <= len(last.response.token_ids) <= 2
    job.cancel()  # does nothing
    assert scheduler.stats().running_rows == 0


def test_cancelling_while_waiting(model: VLM, gate: Gate) -> None:
    with Scheduler(model, max_running=1) as scheduler:
        first = scheduler.submit(question(), max_new_tokens=3)
        assert gate.waits.wait(WAIT)
        second = scheduler.submit(question())
        second.cancel()
        gate.open.set()
        with raises(ServerError, "server.cancelled"):
            second.result(WAIT)
        assert list(second.events()) == [second.ended]
        assert second.ended is not None
        assert second.ended.response is None
        first.result(WAIT)


def test_a_full_queue(model: VLM, gate: Gate) -> None:
    with Scheduler(model, max_running=2, max_queue=1) as scheduler:
        jobs = [scheduler.submit(question(), max_new_tokens=3)]
        assert gate.waits.wait(WAIT)
        jobs.append(scheduler.submit(question(), num_beams=2))  # waits for two rows
        with raises(ServerError, "server.queue-full", "1") as caught:
            scheduler.submit(question())
        assert caught.value.retry_after is not None
        assert caught.value.retry_after >= 1
        assert scheduler.stats().refused == 1
        gate.open.set()
        for job in jobs:
            job.result(WAIT)
        scheduler.submit(question()).result(WAIT)


def test_without_a_queue_free_rows_are_used(model: VLM, gate: Gate) -> None:
    with Scheduler(model, max_running=2, max_queue=0) as scheduler:
        jobs = [scheduler.submit(question(), max_new_tokens=3) for _ in range(2)]
        with raises(ServerError, "server.queue-full"):
            scheduler.submit(question())
        gate.open.set()
        for job in jobs:
            job.result(WAIT)


def test_a_time_limit_gives_the_answer_so_far(scheduler: Scheduler, gate: Gate) -> None:
    options: Any = {"max_new_tokens": LONG, "min_new_tokens": LONG}
    job = scheduler.submit(question(), time_limit=1, **options)
    assert gate.waits.wait(WAIT)
    time.sleep(1.05)
    gate.open.set()
    response = job.result(WAIT)
    assert job.reason == "time-limit"
    assert not response.complete
    assert response.stop_reason is None
    assert 1 <= len(response.token_ids) < LONG
    check_pieces(job)


@pytest.mark.parametrize("steps", [1, 6, 7, 8])
@pytest.mark.parametrize(
    ("stop", "options"),
    [
        ("KEa", {}),  # after "KK" the second K may become it
        ("theG", {"do_sample": True, "seed": 1, "temperature": 3.0}),  # in the token " the"
        ("bns<", {"do_sample": True, "seed": 1, "num_return_sequences": 2}),
    ],
)
def test_an_early_end_gives_the_text_that_was_held_back(
    model: VLM,
    scheduler: Scheduler,
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
    stop: str,
    options: dict[str, Any],
) -> None:
    """Text that may become a stop string is not streamed until it can't."""
    options = {**options, "max_new_tokens": LONG, "min_new_tokens": LONG}
    assert stop in model.generate(question(), **options).text
    count, original, submitted = 0, KeyValueCache.step, threading.Event()

    def step(self: KeyValueCache, embeds: Any) -> Any:
        nonlocal count
        count += 1
        if count == steps:
            assert submitted.wait(WAIT)
            job.cancel()
        return original(self, embeds)

    monkeypatch.setattr(KeyValueCache, "step", step)
    job = scheduler.submit(question(), stop_strings=[f"{stop}#"], **options)
    submitted.set()
    *events, last = job.events(WAIT)
    assert isinstance(last, Finished)
    assert last.response is not None
    for n, answer in enumerate((last.response, *last.response.alternatives)):
        own = [one for one in events if isinstance(one, Piece) and one.sequence == n]
        assert "".join(piece.text for piece in own) == answer.text
        assert sum((piece.token_ids for piece in own), ()) == answer.token_ids


def test_a_time_limit_in_the_queue(model: VLM, gate: Gate) -> None:
    with Scheduler(model, max_running=1) as scheduler:
        first = scheduler.submit(question(), max_new_tokens=3)
        assert gate.waits.wait(WAIT)
        second = scheduler.submit(question(), time_limit=0.05)
        time.sleep(0.06)
        gate.open.set()
        with raises(ServerError, "server.time-limit"):
            second.result(WAIT)
        first.result(WAIT)


def test_a_job_that_waits_for_its_images_is_ended_in_time(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    let, original = threading.Event(), FeatureCache.encoded

    def encoded(self: FeatureCache, image: Any) -> Any:
        assert let.wait(WAIT)
        return original(self, image)

    monkeypatch.setattr(FeatureCache, "encoded", encoded)
    late = scheduler.submit(question(images=1), [toy.picture(1)], time_limit=0.1)
    gone = scheduler.submit(question(images=1), [toy.picture(2)])
    gone.cancel()
    for job, code in ((late, "server.time-limit"), (gone, "server.cancelled")):
        with raises(ServerError, code):
            job.result(WAIT)
    text = scheduler.submit(question()).result(WAIT)  # passes the images
    assert text.token_ids
    let.set()
    assert scheduler.stats().ended == {"time-limit": 1, "cancelled": 1, "finished": 1}


def test_errors_of_a_request_come_at_once(scheduler: Scheduler) -> None:
    with raises(OptionError, "option.unknown", "num_beam"):
        scheduler.submit(question(), num_beam=2)  # pyright: ignore[reportCallIssue]
    with raises(OptionError, "option.wrong-value", 17, 16):
        scheduler.submit(question(), num_beams=17)
    with raises(OptionError, "option.wrong-value", 20, 16):
        scheduler.submit(question(), num_return_sequences=20, do_sample=True)
    with raises(OptionError, "option.unknown", "gian"):
        scheduler.submit(question(images=1), [toy.picture()], image_options={"gian": 2})
    with raises(PromptError, "prompt.image-count"):
        scheduler.submit(question(images=1))
    with raises(PromptError, "prompt.too-long", 600):
        scheduler.submit(question("or " * 700))
    for wrong in (0, -1, float("inf"), float("nan"), "1"):
        with raises(OptionError, "option.wrong-value", "time_limit"):
            scheduler.submit(question(), time_limit=wrong)  # pyright: ignore[reportArgumentType]
    assert scheduler.stats().submitted == 0


def test_errors_of_images_come_from_the_job(scheduler: Scheduler) -> None:
    job = scheduler.submit(question(images=1), [b"nothing"])
    with raises(ImageError, "image.not-a-picture"):
        job.result(WAIT)
    assert job.reason == "failed"
    assert len(list(job.events())) == 1
    big = scheduler.submit(question(images=1), [toy.picture(1, 120, 120)])
    with raises(PromptError, "prompt.too-long", 600):
        big.result(WAIT)
    assert scheduler.stats().images_encoded == 0
    scheduler.submit(question(images=1), [toy.picture(1)]).result(WAIT)


def test_an_error_of_one_search_ends_that_job_alone(model: VLM, scheduler: Scheduler) -> None:
    tokens = range(model.components.manifest.dims.vocab_size)
    want = model.generate(question(), max_new_tokens=20)
    other = scheduler.submit(question(), max_new_tokens=20)
    job = scheduler.submit(question(), suppress_tokens=list(tokens))
    third = scheduler.submit(question(), bad_words_ids=[[want.token_ids[0], n] for n in tokens])
    for bad in (job, third):
        with raises(OptionError, "option.no-token-left"):
            bad.result(WAIT)
    assert facts(other.result(WAIT)) == facts(want)


def test_an_error_of_the_decoder_ends_the_running_jobs(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, fails = KeyValueCache.step, threading.Event()

    def step(self: KeyValueCache, embeds: Any) -> Any:
        if fails.is_set():
            raise MemoryError("no memory")
        return original(self, embeds)

    monkeypatch.setattr(KeyValueCache, "step", step)
    fails.set()
    job = scheduler.submit(question())
    with pytest.raises(MemoryError):
        job.result(WAIT)
    fails.clear()
    assert scheduler.submit(question()).result(WAIT).token_ids


def test_closing_waits_for_what_runs(model: VLM) -> None:
    scheduler = Scheduler(model, max_running=1)
    jobs = [scheduler.submit(question(images=1), [toy.picture(n)]) for n in range(3)]
    scheduler.close(grace=WAIT)
    assert all(job.reason == "finished" for job in jobs)
    with raises(ServerError, "server.draining"):
        scheduler.submit(question())
    scheduler.close()


def test_closing_cuts_after_the_grace(model: VLM, gate: Gate) -> None:
    scheduler = Scheduler(model, max_running=1)
    running = scheduler.submit(question(), max_new_tokens=LONG, min_new_tokens=LONG)
    waiting = scheduler.submit(question())
    assert gate.waits.wait(WAIT)
    closing = threading.Thread(target=scheduler.close, args=(0.05,))
    closing.start()
    time.sleep(0.1)
    gate.open.set()
    closing.join(WAIT)
    assert not closing.is_alive()
    assert running.reason == waiting.reason == "shutdown"
    assert running.result().token_ids
    assert not running.result().complete
    check_pieces(running)
    with raises(ServerError, "server.draining"):
        waiting.result()


def test_waiting_for_a_job_has_a_limit(scheduler: Scheduler, gate: Gate) -> None:
    job = scheduler.submit(question())
    assert gate.waits.wait(WAIT)
    assert isinstance(next(job.events(WAIT)), Piece)
    with pytest.raises(TimeoutError):
        job.result(0.01)
    with pytest.raises(TimeoutError):
        list(job.events(0.01))


def test_sizes_are_checked(model: VLM) -> None:
    for name, value in (("max_running", 0), ("max_queue", -1), ("cache_bytes", -1)):
        with raises(OptionError, "option.wrong-value", name):
            Scheduler(model, **{name: value})  # pyright: ignore[reportArgumentType]
