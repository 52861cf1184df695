"""Conversations: the answers of a fresh prefill, for the work of what is new."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.idefics3_checkpoints import write_idefics3_checkpoint
from tests.runtime import toy
from vlmport.bundle import Bundle
from vlmport.errors import DeviceError, ImageError, OptionError, PromptError
from vlmport.export import export
from vlmport.runtime.asking import Held
from vlmport.runtime.cache import KeptRow, KeyValueCache
from vlmport.runtime.components import VISION, Components
from vlmport.runtime.conversation import Conversation
from vlmport.runtime.generate import Generation
from vlmport.runtime.model import VLM

CANONICAL = " [b-d]{4}"  # whatever the model is: a text that is tokenized as it was generated


def picture(seed: int, height: int = 40, width: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def long_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The toy with room for some turns."""
    return toy.write_bundle(tmp_path_factory.mktemp("toy"), context=600)


@pytest.fixture
def vlm(long_bundle: Bundle) -> VLM:
    return VLM.open(long_bundle, threads=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_idefics3_checkpoint(tmp_path_factory.mktemp("idefics3") / "checkpoint")


@pytest.fixture(scope="module")
def tiled_bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export(checkpoint, tmp_path_factory.mktemp("idefics3") / "b", precisions="fp32,q8")


@pytest.fixture
def tiled(tiled_bundle: Bundle) -> VLM:
    """A tiny Idefics3: pictures of many tiles."""
    return VLM.open(tiled_bundle, precision="fp32", threads=1)


@dataclass
class Work:
    """What was run since it was last taken: tiles encoded, tokens prefilled."""

    tiles: int = 0
    prefilled: list[int] = field(default_factory=list)

    def take(self) -> tuple[int, list[int]]:
        done = (self.tiles, self.prefilled)
        self.tiles, self.prefilled = 0, []
        return done


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    work = Work()
    session, prefill = Components.session, KeyValueCache.prefill

    class Counted:
        def __init__(self, inner: Any):
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def run(self, *args: Any) -> Any:
            work.tiles += 1
            return self.inner.run(*args)

    def counted(self: Components, component: str) -> Any:
        found = session(self, component)
        return Counted(found) if component == VISION else found

    def counted_prefill(self: KeyValueCache, row: int, embeds: np.ndarray, *args: Any, **k: Any):
        work.prefilled.append(len(embeds))
        return prefill(self, row, embeds, *args, **k)

    monkeypatch.setattr(Components, "session", counted)
    monkeypatch.setattr(KeyValueCache, "prefill", counted_prefill)
    return work


def fresh(vlm: VLM, chat: Conversation, **options: Any) -> tuple[int, ...]:
    """The tokens of the last answer when all before it is one prompt of its own."""
    return vlm.generate(chat.messages[:-1], **options).token_ids


def with_template(bundle: Bundle, folder: Path, template: str) -> VLM:
    """The same graphs under another template."""
    shutil.copytree(bundle.folder, folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return VLM.open(Bundle(folder, bundle.manifest), threads=1)


# What is saved


def test_a_second_question_costs_no_encode_and_no_prefill_of_what_was_there(
    tiled: VLM, work: Work
) -> None:
    chat = tiled.conversation()
    first = chat.ask("What is it?", [picture(0)], regex=CANONICAL)
    assert first.stop_reason == "stop"
    tiles, prefilled = work.take()
    assert tiles == 7  # 2 x 3 and the whole
    assert prefilled == [first.counts["prompt_tokens"]]
    assert first.counts["cached_tokens"] == 0
    there = first.counts["prompt_tokens"] + len(first.token_ids) - 1  # the stop token is not fed
    assert chat.cached_tokens == there
    second = chat.ask("Where?", max_new_tokens=8)
    assert second.counts["cached_tokens"] == there
    assert work.take() == (0, [second.counts["prompt_tokens"] - there])
    assert second.counts["image_tokens"] == first.counts["image_tokens"] == 7 * 4
    assert second.token_ids == fresh(tiled, chat, max_new_tokens=8)


def test_other_pictures_join_and_the_first_stays(tiled: VLM, work: Work) -> None:
    """Only the new one is encoded; one that was seen in this conversation is not."""
    chat = tiled.conversation(image_options={"do_image_splitting": False})
    chat.ask("one", [picture(0)], regex=CANONICAL)
    assert work.take()[0] == 1
    answer = chat.ask("two", [picture(1), picture(0)], max_new_tokens=5)
    assert work.take()[0] == 1
    assert answer.counts["image_tokens"] == 3 * 4
    assert answer.counts["cached_tokens"] > 4
    want = tiled.generate(
        chat.messages[:-1], image_options={"do_image_splitting": False}, max_new_tokens=5
    )
    assert answer.token_ids == want.token_ids


def test_features_outlive_the_cache_of_features(
    long_bundle: Bundle, tmp_path: Path, work: Work
) -> None:
    """All is prefilled anew where the prompt begins otherwise; still nothing is encoded twice."""
    template = "{{ messages | length }}:" + toy.TEMPLATE
    vlm = with_template(long_bundle, tmp_path / "counting", template)
    vlm.features.max_bytes = 0
    chat = vlm.conversation()
    chat.ask("the", [toy.picture(0)])
    assert work.take()[0] == 1
    answer = chat.ask("and")
    assert answer.counts["cached_tokens"] == 0
    assert work.take() == (0, [answer.counts["prompt_tokens"]])
    assert answer.token_ids == fresh(vlm, chat)


def test_history_that_is_written_otherwise_counts_as_far_as_it_is_alike(
    long_bundle: Bundle, tmp_path: Path
) -> None:
    shouting = toy.TEMPLATE.replace(
        "part.text }}", "(part.text | upper if message.role == 'assistant' else part.text) }}"
    )
    vlm = with_template(long_bundle, tmp_path / "shouting", shouting)
    chat = vlm.conversation()
    first = chat.ask("the", [toy.picture(0)], regex="x[a-d]{6}")
    second = chat.ask("and")
    assert second.counts["cached_tokens"] == first.counts["prompt_tokens"]
    assert second.token_ids == fresh(vlm, chat)


@pytest.mark.parametrize("same", [True, False])
def test_the_same_ids_over_another_picture_are_not_alike(vlm: VLM, same: bool) -> None:
    """The prompt again, with a picture of the same size."""
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "the"}]}]
    images = [toy.picture(0), toy.picture(0 if same else 1)]
    decoding = vlm.asker.decoding({})
    first = vlm.asker.prompt(asked, images[:1], decoding)
    generation = Generation(vlm.components, [first.request])
    generation.run()
    row = generation.keep(first.request)
    ids = np.concatenate([first.ids, first.request.tokens])[: row.length]
    second = vlm.asker.ready(
        vlm.asker.text_ids(asked),
        [vlm.asker.picture(images[1])],
        decoding,
        0.0,
        Held(row, ids, first.image_rows),
    )
    before = int(np.flatnonzero(first.ids == toy.IMAGE)[0])
    assert (second.ids == first.ids).all()
    cached = len(second.ids) - len(second.request.embeds)
    assert cached == (len(second.ids) - 1 if same else before)
    Generation(vlm.components, [second.request]).run()
    assert second.request.tokens == vlm.generate(asked, images[1:]).token_ids
    if not same:  # with the rows of the first picture the answer would be that of the first
        assert second.request.tokens != first.request.tokens


def test_what_a_prompt_shares_with_a_row() -> None:
    image = 9

    def shared(held: list[int], keys: str, ids: list[int], others: str) -> int:
        row = KeptRow(len(held), 0, ())
        one = Held(row, np.array(held), tuple(key.encode() for key in keys))
        return one.shared(np.array(ids), [key.encode() for key in others], image)

    assert shared([1, 2, 3], "", [1, 2, 3, 4], "") == 3
    assert shared([1, 2, 3], "", [1, 2, 3], "") == 2  # one is left to choose from
    assert shared([1, 2, 3, 4, 5], "", [1, 2, 3], "") == 2
    assert shared([1, 2, 3], "", [1, 5, 3, 4], "") == 1
    assert shared([1, 2, 3], "", [5, 2, 3, 4], "") == 0
    assert shared([1, 9, 9, 2], "aa", [1, 9, 9, 2, 3], "aa") == 4
    assert shared([1, 9, 9, 2], "aa", [1, 9, 9, 2, 3], "bb") == 1
    assert shared([1, 9, 9, 2], "ab", [1, 9, 9, 2, 3], "aa") == 2
    assert shared([1, 9, 9, 2], "a", [1, 9, 9, 2, 3], "ab") == 2  # the second one was generated
    assert shared([1, 9, 9], "aa", [1, 9, 9], "aa") == 2  # within a picture
    assert shared([], "", [1], "") == 0


def test_a_prompt_that_ends_within_a_picture(tiny_bundle: Path) -> None:
    """A captioner's prompt is its picture: asked again, all but the last row is there."""
    with VLM.open(tiny_bundle, precision="fp32", threads=1) as vlm:
        chat = vlm.conversation()
        chat.attach(picture(0))
        pieces = chat.stream(max_new_tokens=6)
        next(pieces)
        pieces.close()
        answer = chat.ask(max_new_tokens=6)
        assert answer.counts["cached_tokens"] == answer.counts["prompt_tokens"] - 1 == 24
        assert answer.token_ids == vlm.caption(picture(0), max_new_tokens=6).token_ids
        with pytest.raises(PromptError, match="this captioner takes pictures and no text"):
            chat.ask("Why?")
        assert len(chat.messages) == 2


# The answers are those of a fresh prefill


@settings(max_examples=25, deadline=None)
@given(
    turns=st.lists(
        st.tuples(
            st.text("ab on the.\n", max_size=12),
            st.lists(st.tuples(st.integers(0, 2), st.integers(4, 14)), max_size=2),
            st.integers(1, 8),
        ),
        min_size=1,
        max_size=4,
    ),
    system=st.sampled_from([None, "be brief"]),
)
def test_answers_are_those_of_a_fresh_prefill(long_bundle: Bundle, turns, system) -> None:
    vlm = VLM.open(long_bundle, threads=1)
    chat = vlm.conversation(system)
    for question, pictures, tokens in turns:
        images = [toy.picture(seed, side, side + 3) for seed, side in pictures]
        answer = chat.ask(question, images, max_new_tokens=tokens)
        assert answer.token_ids == fresh(vlm, chat, max_new_tokens=tokens)
        assert chat.messages[-1]["content"][0]["text"] == answer.text.strip()
    assert len(chat.messages) == 2 * len(turns) + (system is not None)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6},
        {"do_sample": True, "seed": 3, "temperature": 2.0, "num_return_sequences": 2},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"prompt_lookup_num_tokens": 4, "max_new_tokens": 30},
        {"regex": "[a-c]{3}", "logprobs": 2},
        {"stop_strings": ["a", "e"], "max_new_tokens": 30},
    ],
    ids=lambda options: next(iter(options)),
)
def test_all_ways_to_decode(vlm: VLM, options: dict[str, Any]) -> None:
    chat = vlm.conversation()
    for turn, images in enumerate([[toy.picture(0)], [], [toy.picture(1)]]):
        answer = chat.ask("the bar", images, **options)
        assert (answer.counts["cached_tokens"] > 0) == (turn > 0)
        want = vlm.generate(chat.messages[:-1], **options)
        assert [one.token_ids for one in (answer, *answer.alternatives)] == [
            one.token_ids for one in (want, *want.alternatives)
        ]
        assert chat.messages[-1]["content"][0]["text"] == answer.text.strip()


def test_transformers_says_the_same_over_two_turns(checkpoint: Path, tiled: VLM) -> None:
    """Its own processor and `generate`, greedy, on the whole conversation."""
    import torch
    from PIL import Image

    from vlmport.verify.references import load_reference

    token = tiled.components.manifest.prompt.image_token_id
    reference: Any = load_reference(checkpoint, image_token_id=token)
    images = [Image.fromarray(picture(0)), Image.fromarray(picture(1, 20, 90))]
    chat = tiled.conversation()
    for turn, question in enumerate(["What is it?", "And this one?"]):
        answer = chat.ask(question, [images[turn]], max_new_tokens=10)
        asked = [
            {**m, "content": [{k: v for k, v in p.items() if k != "image"} for p in m["content"]]}
            for m in chat.messages[:-1]
        ]
        text = reference.processor.apply_chat_template(asked, add_generation_prompt=True)
        inputs = reference.processor(
            text=text, images=[images[: turn + 1]], return_tensors="pt", add_special_tokens=False
        )
        with torch.no_grad():
            made = reference.model.generate(
                **inputs, do_sample=False, max_new_tokens=10, pad_token_id=2,
                eos_token_id=list(reference.stop_token_ids),
            )  # fmt: skip
        assert answer.token_ids == tuple(made[0, inputs["input_ids"].shape[1] :].tolist())
        assert answer.counts["prompt_tokens"] == inputs["input_ids"].shape[1]
    assert answer.counts["cached_tokens"] > 28


def test_eight_bits_round_by_the_call(tiled_bundle: Bundle, work: Work) -> None:
    """What holds there: the first answer is that of `generate`, the same turns give the same
    answers, and nothing is encoded twice. (A later one may differ from a fresh prefill's.)"""
    said = []
    for _ in range(2):
        vlm = VLM.open(tiled_bundle, precision="q8", threads=1)
        assert vlm.components.decoder.row_by_row
        chat = vlm.conversation()
        first = chat.ask("What is it?", [picture(0)], max_new_tokens=8)
        assert first.token_ids == fresh(vlm, chat, max_new_tokens=8)
        work.take()
        second = chat.ask("Where?", max_new_tokens=8)
        assert work.take() == (0, [second.counts["prompt_tokens"] - second.counts["cached_tokens"]])
        said.append((first.token_ids, second.token_ids))
    assert said[0] == said[1]


def test_unequal_prompts_and_tilings_together_say_what_each_says_alone(tiled: VLM) -> None:
    """Text alone, one and two pictures, a question after an answer; split and whole."""
    decoding = tiled.asker.decoding({"max_new_tokens": 9})
    chat = tiled.conversation()
    chat.ask("What is it?", [picture(0)], regex=CANONICAL)

    def user(text: str, pictures: int) -> dict[str, Any]:
        parts = [*[{"type": "image"}] * pictures, {"type": "text", "text": text}]
        return {"role": "user", "content": parts}

    asked: list[tuple[Any, list[np.ndarray], dict[str, Any]]] = [
        ([user("Why?", 0)], [], {}),
        ([user("Which is larger?", 2)], [picture(1, 90, 20), picture(2, 30, 30)], {}),
        ([user("Where?", 1)], [picture(3, 10, 90)], {"do_image_splitting": False}),
        ([*chat.messages, user("Really?", 0)], [], {}),
    ]

    def prompts() -> Iterator[Any]:
        for messages, images, options in asked:
            yield tiled.asker.prompt(messages, images, decoding, options)

    together = tiled._run(list(prompts()))
    assert len({one.counts["prompt_tokens"] for one in together}) == 4
    assert len({one.token_ids for one in together}) == 4
    for answer, prompt in zip(together, prompts(), strict=True):
        assert answer.token_ids == tiled._run([prompt])[0].token_ids


# A conversation is what it was until an answer is complete


def interrupting(vlm: VLM, at: int, when: str) -> Callable[[pytest.MonkeyPatch], None]:
    session, calls = vlm.components.decoder.session, 0
    original = session.run_with_iobinding

    def interrupted(binding: object) -> None:
        nonlocal calls
        calls += 1
        if calls == at and when == "before":
            raise KeyboardInterrupt
        original(binding)
        if calls == at:
            raise KeyboardInterrupt

    return lambda patch: patch.setattr(session, "run_with_iobinding", interrupted)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("at", range(1, 7))
@pytest.mark.parametrize("way", ["ask", "stream"])
def test_an_interrupt_at_any_token(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch, work: Work, way: str, at: int, when: str
) -> None:
    """The conversation is as it was, asking again gives the answer, and what was done is kept."""
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6}
    plain = vlm.conversation()
    want = [plain.ask("the", [toy.picture(0)], **options), plain.ask("bar", **options)]
    chat = vlm.conversation()
    chat.ask("the", [toy.picture(0)], **options)
    before = chat.messages
    with monkeypatch.context() as patch:
        interrupting(vlm, at, when)(patch)
        ask = chat.ask if way == "ask" else lambda *a, **o: list(chat.stream(*a, **o))
        with pytest.raises(KeyboardInterrupt):
            ask("bar", **options)
    assert _texts(chat.messages) == _texts(before)
    again = chat.ask("bar", **options)
    assert again.token_ids == want[1].token_ids
    assert _texts(chat.messages) == _texts(plain.messages)
    prefilled = at > 1  # the first call is the prefill: interrupted after it, it does not count
    cached = again.counts["prompt_tokens"] - 1 if prefilled else want[1].counts["cached_tokens"]
    assert again.counts["cached_tokens"] == cached


def _texts(messages: list[Any]) -> list[Any]:
    return [(m["role"], [part.get("text", "…") for part in m["content"]]) for m in messages]


@pytest.mark.parametrize("after", range(8))
def test_a_stream_closed_after_any_piece(vlm: VLM, after: int) -> None:
    chat = vlm.conversation()
    whole = vlm.conversation()
    pieces = list(whole.stream("the bar", [toy.picture(0)], max_new_tokens=6))
    assert 3 < len(pieces) < 7  # so that some `after` is past the last
    stream = chat.stream("the bar", [toy.picture(0)], max_new_tokens=6)
    taken = [next(stream) for _ in range(min(after, len(pieces)))]
    stream.close()
    assert taken == pieces[:after]
    if after >= len(pieces):  # the last piece was given, so the answer is said
        assert _texts(chat.messages) == _texts(whole.messages)
    else:
        assert chat.messages == []
        answer = chat.ask("the bar", [toy.picture(0)], max_new_tokens=6)
        assert answer.text == "".join(pieces)


def test_a_stream_is_what_ask_says(vlm: VLM) -> None:
    one, other = vlm.conversation(), vlm.conversation()
    for question, images in (("the", [toy.picture(0)]), ("bar", [])):
        assert "".join(one.stream(question, images)) == other.ask(question, images).text
        assert _texts(one.messages) == _texts(other.messages)
        assert one.cached_tokens == other.cached_tokens
    with pytest.raises(OptionError, match="several sequences can't be streamed"):
        one.stream("the", num_beams=2)


@pytest.mark.parametrize("meanwhile", ["ask", "reset", "attach"])
def test_a_stream_during_which_the_conversation_goes_on(vlm: VLM, meanwhile: str) -> None:
    chat = vlm.conversation()
    stream = chat.stream("the", max_new_tokens=5, min_new_tokens=5)
    next(stream)
    if meanwhile == "ask":
        chat.ask("bar", max_new_tokens=2)
    elif meanwhile == "reset":
        chat.reset()
    else:
        chat.attach(toy.picture(0))
    said = _texts(chat.messages)
    with pytest.raises(PromptError, match="the conversation went on while") as caught:
        list(stream)
    assert caught.value.hint
    assert _texts(chat.messages) == said
    chat.ask("and", max_new_tokens=2)
    assert chat.messages[-2]["content"][-1]["text"] == "and"


def test_a_stream_that_is_closed_after_a_reset_brings_nothing_back(vlm: VLM) -> None:
    chat = vlm.conversation()
    stream = chat.stream("the", max_new_tokens=5, min_new_tokens=5)
    next(stream)
    chat.reset()
    stream.close()
    assert (chat.messages, chat.cached_tokens) == ([], 0)


def test_a_broken_decoder_leaves_no_trace(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has put into the cache is not taken for good."""
    chat = vlm.conversation()
    chat.ask("the", max_new_tokens=4)
    cached, said = chat.cached_tokens, _texts(chat.messages)
    embed = vlm.components.embed
    with monkeypatch.context() as patch:
        patch.setattr(vlm.components, "embed", lambda ids: embed(ids) * np.float32(np.nan))
        with pytest.raises(DeviceError, match="not finite"):
            chat.ask("bar", max_new_tokens=4)
        with pytest.raises(DeviceError, match="not finite"):
            list(chat.stream("bar", max_new_tokens=4))
    assert (chat.cached_tokens, _texts(chat.messages)) == (cached, said)
    answer = chat.ask("bar", max_new_tokens=4)
    assert answer.token_ids == fresh(vlm, chat, max_new_tokens=4)


def test_too_long_a_conversation_is_refused_before_anything_runs(
    own_bundle: Callable[..., Bundle], work: Work
) -> None:
    vlm = VLM.open(own_bundle(context=60), threads=1)
    chat = vlm.conversation()
    chat.ask("the bar", [toy.picture(0)], max_new_tokens=4)
    work.take()
    said, cached = _texts(chat.messages), chat.cached_tokens
    chat.attach(toy.picture(1))
    for ask in (chat.ask, chat.stream):
        with pytest.raises(PromptError, match="tokens, the model's context is 60"):
            ask("on the bar")
    assert work.take() == (0, [])
    assert (_texts(chat.messages), chat.cached_tokens, chat.attached) == (said, cached, 1)
    chat.detach()
    assert chat.ask("and", max_new_tokens=1).counts["cached_tokens"] > 20


# What is asked


def test_pictures_that_are_attached_come_first(vlm: VLM) -> None:
    chat = vlm.conversation("be brief")
    chat.attach(toy.picture(0))
    chat.attach(toy.picture(1, 8, 8))
    assert chat.attached == 2
    answer = chat.ask("or", [toy.picture(2, 4, 4)])
    assert chat.attached == 0
    assert [part["type"] for part in chat.messages[1]["content"]] == ["image"] * 3 + ["text"]
    want = vlm.generate(chat.messages[:-1])
    assert answer.token_ids == want.token_ids
    assert answer.counts["image_tokens"] == 12 + 4 + 1
    assert chat.messages[1]["content"][2]["image"].shape == (4, 4, 3)


def test_a_picture_without_a_question_is_captioned(tiled: VLM) -> None:
    chat = tiled.conversation()
    answer = chat.ask(images=[picture(0)], max_new_tokens=6)
    assert answer.token_ids == tiled.caption(picture(0), max_new_tokens=6).token_ids
    assert chat.messages[:1] == [
        {**tiled.components.manifest.prompt.caption[0], "content": chat.messages[0]["content"]}
    ]
    with pytest.raises(PromptError, match="0 pictures given, 1 image part"):
        chat.ask()
    with pytest.raises(PromptError, match="a question is a text, got list"):
        chat.ask([picture(0)])  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="images must be a list of pictures"):
        chat.ask("x", picture(0))  # type: ignore[arg-type]
    assert len(chat.messages) == 2


def test_text_alone_opens_no_vision_session(vlm: VLM) -> None:
    chat = vlm.conversation()
    assert chat.ask("hello").counts["image_tokens"] == 0
    assert chat.ask("and").counts["cached_tokens"] > 0
    assert set(vlm.components.opened) == {"embed_tokens", "decoder_model_merged"}


def test_what_is_wrong_leaves_the_conversation(vlm: VLM, tmp_path: Path) -> None:
    chat = vlm.conversation()
    chat.ask("the", [toy.picture(0)], max_new_tokens=3)
    said = _texts(chat.messages)
    (tmp_path / "text.png").write_text("no picture")
    for image in ("absent.png", tmp_path / "text.png", 5):
        with pytest.raises(ImageError):
            chat.ask("x", [image])  # type: ignore[list-item]
        with pytest.raises(ImageError):
            chat.attach(image)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="unknown option 'max_token'"):
        chat.stream("x", max_token=4)
    with pytest.raises(PromptError, match="its image is None"):
        chat.ask("x", [None])  # type: ignore[list-item]
    with pytest.raises(PromptError, match="1 picture for 2 placeholders"):
        chat.ask("an <image> in words")
    assert (_texts(chat.messages), chat.attached) == (said, 0)


def test_a_reset_keeps_the_system_message_alone(vlm: VLM) -> None:
    chat = vlm.conversation("be brief")
    first = chat.ask("the", [toy.picture(0)])
    chat.attach(toy.picture(1))
    chat.reset()
    assert _texts(chat.messages) == [("system", ["be brief"])]
    assert (chat.attached, chat.cached_tokens) == (0, 0)
    assert chat.ask("the", [toy.picture(0)]).token_ids == first.token_ids
    with pytest.raises(PromptError, match="content is 5"):
        vlm.conversation(5)  # type: ignore[arg-type]


def test_what_is_handed_out_may_be_changed(vlm: VLM) -> None:
    chat = vlm.conversation()
    chat.ask("the")
    messages: Any = chat.messages
    messages[0]["content"][0]["text"] = "bar"
    messages.clear()
    assert _texts(chat.messages)[0] == ("user", ["the"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"do_image_spliting": False}, "unknown (did you mean 'do_image_splitting'?)"),
        ({"do_image_splitting": "no"}, "do_image_splitting='no': expected tensor(bool)"),
        ({"do_image_splitting": 0}, "do_image_splitting=0: expected tensor(bool)"),
        ({"do_image_splitting": None}, "do_image_splitting=None: expected tensor(bool)"),
        ({"do_image_splitting": [[1], [2, 3]]}, "expected tensor(bool)"),
    ],
    ids=str,
)
def test_image_options(tiled: VLM, options: dict[str, Any], said: str) -> None:
    asked = tiled.components.manifest.prompt.caption
    for ask in (
        lambda: tiled.conversation(image_options=options),
        lambda: tiled.generate(asked, [picture(0)], image_options=options),
        lambda: tiled.stream(picture(0), image_options=options),
        lambda: tiled.caption_each([], image_options=options),
    ):
        with pytest.raises(OptionError) as caught:
            ask()
        assert said in str(caught.value)
        assert caught.value.hint


def test_image_options_say_how_a_picture_is_cut(tiled: VLM) -> None:
    whole = {"do_image_splitting": False}
    asked = tiled.components.manifest.prompt.caption
    split = tiled.caption(picture(0), max_new_tokens=2)
    captions = [
        tiled.caption(picture(0), image_options=whole, max_new_tokens=2),
        *tiled.caption_each([picture(0)], image_options=whole, max_new_tokens=2),
        tiled.generate(asked, [picture(0)], image_options=whole, max_new_tokens=2),
        tiled.conversation(image_options=whole).ask(images=[picture(0)], max_new_tokens=2),
    ]
    assert [one.counts["image_tokens"] for one in captions] == [4] * 4  # type: ignore[union-attr]
    assert len({one.token_ids for one in captions}) == 1  # type: ignore[union-attr]
    assert split.counts["image_tokens"] == 28
    pieces = tiled.stream(picture(0), image_options=whole, max_new_tokens=2)
    assert "".join(pieces) == captions[0].text  # type: ignore[union-attr]
