"""One model, shared by threads: each answer is what it is alone, and what is counted is true."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from tests.runtime import toy
from tests.runtime.talking import CANONICAL, picture
from vlmport.bundle import Bundle
from vlmport.errors import OptionError
from vlmport.runtime.decoding import grammar as grammar_module
from vlmport.runtime.graphs import base
from vlmport.runtime.graphs.components import Components
from vlmport.runtime.images.features import FeatureCache, PromptImage
from vlmport.runtime.model import VLM

THREADS = 8
PICTURES = [toy.picture(seed) for seed in range(12)]
ASKED = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "or"}]}]
MANY = {str(n): np.zeros(1, np.int8) for n in range(100)}  # to add them up takes a while


@pytest.fixture
def hurried() -> Iterator[None]:
    """Threads that take turns as often as Python lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(work: Callable[[int], Any]) -> list[Any]:
    """What each thread gives; all begin at once, and what one raises is raised here."""
    meeting = threading.Barrier(THREADS, timeout=60)

    def begin(number: int) -> Any:
        meeting.wait()
        return work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(begin, range(THREADS)))


def three_ways(vlm: VLM, number: int) -> tuple[Any, ...]:
    """A caption, an answer that is streamed and one that is drawn, each of another picture."""
    one, two, three = (PICTURES[(number + more) % len(PICTURES)] for more in (0, 1, 2))
    drawn = vlm.generate(ASKED, [three], do_sample=True, seed=number, num_return_sequences=2)
    return (
        vlm.caption(one).token_ids,
        "".join(vlm.stream(messages=ASKED, images=[two])),
        [other.token_ids for other in (drawn, *drawn.alternatives)],
    )


@pytest.mark.usefixtures("hurried")
def test_each_answer_is_what_it_is_alone(bundle: Bundle) -> None:
    """On a cache that has room for three pictures, so that they come and go all the time."""
    with VLM.open(bundle, threads=1, image_cache_bytes=0) as alone:
        want = [three_ways(alone, number) for number in range(len(PICTURES))]
    with VLM.open(bundle, threads=1, image_cache_bytes=3 * 600) as vlm:

        def work(number: int) -> list[Any]:
            return [three_ways(vlm, (number + turn) % len(PICTURES)) for turn in range(2)]

        for number, got in enumerate(together(work)):
            assert got == [want[(number + turn) % len(PICTURES)] for turn in range(2)]
        assert 0 < vlm.features.nbytes <= 3 * 600
        assert vlm.features.hits + vlm.features.misses == THREADS * 2 * 3


@pytest.mark.usefixtures("hurried")
def test_a_conversation_in_each_thread(long_bundle: Bundle) -> None:
    def talk(vlm: VLM, number: int) -> list[str]:
        chat = vlm.conversation(system="or")
        first = chat.ask("or", [picture(number, 8, 12)], max_new_tokens=4)
        return [first.text, "".join(chat.stream("or or", max_new_tokens=4))]

    with VLM.open(long_bundle, threads=1) as alone:
        want = [talk(alone, number) for number in range(THREADS)]
    with VLM.open(long_bundle, threads=1) as vlm:
        assert together(lambda number: talk(vlm, number)) == want


@pytest.mark.usefixtures("hurried")
def test_the_cache_counts_what_it_holds() -> None:
    """Eight threads that ask for the same pictures at the same time, more than have room."""

    class Instant:
        position_inputs = frozenset(MANY)

        def encode_image(self, inputs: Any) -> np.ndarray:
            return np.zeros((1, len(inputs["0"])), np.float32)

    cache = FeatureCache(Instant(), max_bytes=20 * 170)  # type: ignore[arg-type]
    none = np.zeros(0, np.int64)

    def work(number: int) -> None:
        for turn in range(200):
            n = turn * 7 % 30
            inputs = MANY | {"0": np.zeros(n + 1, np.int8)}
            picture = PromptImage(bytes([n]), none, inputs, None)
            assert cache.encoded(picture).rows.shape == (1, n + 1)
            if n == 0 and number == 0:
                cache.clear()

    together(work)
    assert (
        cache.nbytes == sum(one.nbytes for one in cache.store._values.values()) <= cache.max_bytes
    )
    assert cache.hits + cache.misses == THREADS * 200
    cache.clear()
    assert cache.nbytes == 0


@pytest.mark.usefixtures("hurried")
def test_nothing_is_opened_twice(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a graph nor the tokenizer of a grammar, which takes seconds in large models."""
    opened: list[str] = []
    open_session, read = base.open_session, grammar_module.GrammarTokenizer

    def noted(path: Any, *args: Any, **more: Any) -> Any:
        opened.append(path.name)
        return open_session(path, *args, **more)

    def read_noted(*args: Any) -> Any:
        opened.append("grammar")
        return read(*args)

    monkeypatch.setattr(base, "open_session", noted)
    monkeypatch.setattr(grammar_module, "GrammarTokenizer", read_noted)
    with VLM.open(bundle, threads=1) as vlm:
        texts = together(lambda _: vlm.caption(PICTURES[0], regex=CANONICAL).text)
        assert len(set(texts)) == 1
        assert len(opened) == len(set(opened)) == len(vlm.components.opened) + 1


def test_the_size_of_the_cache_is_an_option(bundle: Bundle) -> None:
    for size, kept in ((0, False), (1 << 20, True)):
        with VLM.open(bundle, threads=1, image_cache_bytes=size) as vlm:
            vlm.caption(PICTURES[0])
            assert (vlm.features.nbytes > 0) is kept
    with VLM(Components.open(bundle)) as vlm:
        assert vlm.features.max_bytes == 256 * 1024 * 1024
    for wrong in (-1, 1.5, "256MB", None):
        with pytest.raises(OptionError, match="image_cache_bytes"):
            VLM.open(bundle, image_cache_bytes=wrong)  # type: ignore[arg-type]
