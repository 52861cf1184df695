"""What an answer says of itself: its special tokens, whether it is whole, and a full context."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import numpy as np
import pytest

from tests.runtime.talking import picture
from vlmport import load
from vlmport.bundle import Bundle
from vlmport.errors import AnswerWarning, OptionError, PromptError, VlmportError
from vlmport.runtime.conversation import Conversation
from vlmport.runtime.decoding.options import CHECKS, GRAMMARS, GenerationOptions
from vlmport.runtime.model import VLM
from vlmport.runtime.response import Caption

ASKED = [{"role": "user", "content": "a text"}]


@pytest.fixture
def vlm(long_bundle: Bundle) -> VLM:
    return VLM.open(long_bundle, threads=1)


def test_special_tokens_are_kept_as_transformers_decodes_them(vlm: VLM) -> None:
    """The stop token is one, and a stream gives the same text."""
    decode = vlm.prompter.tokenizer.decode
    regex = "bcd"
    plain = vlm.generate(ASKED, regex=regex)
    kept = vlm.generate(ASKED, regex=regex, skip_special_tokens=False)
    assert kept.stop_reason == plain.stop_reason == "stop"
    assert kept.token_ids == plain.token_ids
    assert kept.text == decode(list(kept.token_ids), skip_special_tokens=False)
    assert kept.text == plain.text + "<|endoftext|>"
    options: dict[str, Any] = {"regex": regex, "skip_special_tokens": False}
    assert "".join(vlm.stream(messages=ASKED, **options)) == kept.text
    stopped = vlm.generate(ASKED, stop_strings=[plain.text[1:]], **options)
    assert stopped.text == plain.text[:1]


def test_a_conversation_goes_on_without_the_stop_token(vlm: VLM) -> None:
    """Its template writes the end of a turn; the cache serves all the same."""
    chat = vlm.conversation()
    first = chat.ask("One?", regex=" [b-d]{4}", skip_special_tokens=False)
    assert first.text.endswith("<|endoftext|>")
    assert chat.messages[-1]["content"][0]["text"] == first.text[: -len("<|endoftext|>")].strip()
    assert chat.last == first
    there = first.counts["prompt_tokens"] + first.counts["new_tokens"] - 1
    assert chat.ask("Two?", max_new_tokens=1).counts["cached_tokens"] <= there


def test_a_cut_answer_under_a_grammar_warns_and_says_so(vlm: VLM) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    for cut in (
        lambda: vlm.generate(ASKED, json_schema=schema, max_new_tokens=2).complete,
        lambda: vlm.conversation().ask("a", json_schema=schema, max_new_tokens=2).complete,
        lambda: bool(list(vlm.stream(messages=ASKED, json_schema=schema, max_new_tokens=2))) - 1,
        lambda: bool(list(vlm.conversation().stream("a", regex="b{9}", max_new_tokens=2))) - 1,
    ):
        with pytest.warns(AnswerWarning) as caught:
            assert not cut()
        assert [one.message.code for one in caught] == ["output.cut"]  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not vlm.generate(ASKED, max_new_tokens=2, min_new_tokens=2).complete
        assert vlm.generate(ASKED, regex="[b-d]{2,}", max_new_tokens=4).complete  # may end there
        assert vlm.generate(ASKED, regex="[b-d]{2}").complete


def ask_often(chat: Conversation) -> Caption:
    """Six questions of some 130 tokens, each about an image."""
    answers = [
        chat.ask("word " * 25, [picture(seed, 12, 12)], max_new_tokens=4) for seed in range(6)
    ]
    return answers[-1]


def test_a_full_conversation_is_said_and_drops_its_oldest_turns_where_asked(vlm: VLM) -> None:
    """Their images too; the system message stays, and so does the answer of a fresh prefill."""
    strict = vlm.conversation("Be brief.")
    dropping = vlm.conversation("Be brief.", drop_oldest=True)
    with pytest.raises(PromptError) as caught:
        ask_often(strict)
    assert caught.value.code == "conversation.full"
    assert "600" in str(caught.value)
    before = strict.messages
    assert len(before) < 13
    answer = ask_often(dropping)
    assert dropping.messages[0]["role"] == "system"
    assert len(dropping.messages) < 13
    kept = [part for one in dropping.messages for part in one["content"] if part["type"] == "image"]
    assert answer.counts["image_tokens"] == 9 * len(kept)
    assert (kept[-1]["image"] == picture(5, 12, 12)).all()
    assert answer.token_ids == vlm.generate(dropping.messages[:-1], max_new_tokens=4).token_ids
    # A question that would not fit alone loses nothing.
    said = dropping.messages
    with pytest.raises(PromptError) as alone:
        dropping.ask("x" * 700)
    assert alone.value.code == "prompt.too-long"
    assert len(dropping.messages) == len(said)
    strict.reset()
    assert strict.ask("a", max_new_tokens=1)


def test_room_is_left_for_the_answer(vlm: VLM) -> None:
    """For max_new_tokens, or a quarter of the context; else the answer would end at once."""
    context = vlm.components.manifest.dims.context_length
    chat = vlm.conversation(drop_oldest=True)
    chat.ask("a" * 400, max_new_tokens=1)
    answer = chat.ask("b" * 150, max_new_tokens=100, min_new_tokens=1)
    assert context - answer.counts["prompt_tokens"] >= 100
    assert len(chat.messages) == 2
    full = vlm.conversation()
    full.ask("a" * 570, max_new_tokens=100, min_new_tokens=1, suppress_tokens=[0])
    assert full.fills_context


@pytest.mark.parametrize(
    ("name", "here"),
    [
        ("stop", "stop_strings"),
        ("n", "num_return_sequences"),
        ("logit_bias", "sequence_bias"),
        ("max_tokens", "max_new_tokens"),
        ("maxNewTokens", "max_new_tokens"),
        ("doSample", "do_sample"),
        ("num_predict", "max_new_tokens"),
        ("repeat_penalty", "repetition_penalty"),
        ("presencePenalty", "presence_penalty"),
        ("response_format", "json_schema"),
        ("top_ps", "top_p"),
    ],
)
def test_names_of_other_programs_lead_to_those_here(name: str, here: str) -> None:
    with pytest.raises(OptionError) as caught:
        GenerationOptions.of({name: 1})
    assert caught.value.code == "option.unknown"
    assert repr(name) in str(caught.value)
    known = "known: " in str(caught.value.hint)
    assert here in f"{caught.value}{'' if known else caught.value.hint}"


def test_a_temperature_of_zero_names_what_is_meant() -> None:
    for value in (0, 0.0, np.float32(0)):
        with pytest.raises(OptionError) as caught:
            GenerationOptions.of({"temperature": value, "do_sample": True})
        assert caught.value.code == "option.temperature-zero"
        assert "do_sample=False" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["stop_strings", "regex", "json_schema"])
def test_a_text_that_is_no_unicode_is_refused(name: str) -> None:
    """As Python passes on bytes of the command line that are no UTF-8."""
    texts: list[Any] = ["a\udcff"] if name != "json_schema" else ['{"const": "\ud800"}']
    if name == "json_schema":
        texts.append({"const": "\ud800"})
    for text in texts:
        with pytest.raises(OptionError) as caught:
            GenerationOptions.of({name: text})
        assert caught.value.code == "option.not-unicode"
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("number", [10**400, 10**5000], ids=["long", "longer than Python writes"])
def test_a_number_of_hundreds_of_digits_is_refused(number: int) -> None:
    with_bias = {"sequence_bias": [[[5], number]]}
    for options in (with_bias, *({name: number} for name in CHECKS)):
        with contextlib.suppress(OptionError):  # others are not caught: none comes through
            GenerationOptions.of(options)
    with pytest.raises(OptionError):
        GenerationOptions.of({"temperature": number, "do_sample": True})
    with pytest.raises(OptionError):
        GenerationOptions.of(with_bias)


LONG = ("x" * 1_000_000, "x " * 500_000, "x " * 400, "x" * 800)
VALUES = [*LONG, [1] * 50_000, {"x " * 50_000: 1}, LONG[0].encode()]


def refused(work: Any) -> None:
    """What fails, fails in a short message, which repeats at most 200 characters."""
    error = None
    try:
        work()
    except VlmportError as caught:  # others are not caught: none comes through
        error = caught
    message = "" if error is None else f"{error}|{error.hint}"
    assert len(message) < 2000
    assert "x" * 201 not in message
    assert "x " * 101 not in message
    assert "1, " * 68 not in message


@pytest.mark.parametrize("value", VALUES, ids=lambda value: f"{type(value).__name__}{len(value)}")
def test_no_message_repeats_a_long_value(long_bundle: Bundle, value: Any) -> None:
    vlm: Any = VLM.open(long_bundle, threads=1)
    pixels = np.zeros((8, 8, 3), np.uint8)
    text = value if isinstance(value, str) else "x"
    for name in CHECKS:
        if name not in ("stop_strings", *GRAMMARS) or not isinstance(value, str):
            refused(lambda name=name: GenerationOptions.of({name: value}))
    for work in (
        lambda: GenerationOptions.of({text: 1}),
        lambda: GenerationOptions.of({"guidance_scale": value}),
        lambda: vlm.caption(value),
        lambda: vlm.caption(f"data:{text}"),
        lambda: vlm.caption(f"file://{text}/{text}"),
        lambda: vlm.caption(f"https://{text}"),
        lambda: vlm.caption(pixels, image_options={text: 1}),
        lambda: vlm.caption(pixels, image_options={"scale": value}),
        lambda: vlm.caption(pixels, batch_size=value),
        lambda: vlm.generate(value),
        lambda: vlm.generate([value]),
        lambda: vlm.generate(ASKED, value),
        lambda: vlm.generate([{"role": value, "content": "x"}]),
        lambda: vlm.generate([{"role": "user", "content": [value]}]),
        lambda: vlm.generate([{"role": "user", "content": [{"type": value}]}]),
        lambda: vlm.generate([{"role": "user", "content": [{"type": "image", text: 1}]}]),
        lambda: vlm.generate([{"role": "user", "content": [{"type": "image", "url": value}]}]),
        lambda: vlm.generate([{"role": "user", "content": [{"type": "image", "base64": value}]}]),
        lambda: vlm.generate([{"role": "user", "content": "x", text: value}]),
        lambda: vlm.conversation().ask(value[:2000] if isinstance(value, str) else value),
        lambda: vlm.conversation().attach(value),
        lambda: VLM.open(vlm.components.bundle, precision=text),
        lambda: VLM.open(vlm.components.bundle, device=text),
        lambda: VLM.open(text),
        lambda: load(text),
    ):
        refused(work)


def test_a_long_pattern_or_schema_is_cut_in_its_error(vlm: VLM) -> None:
    options: Any
    for options in ({"regex": "(" + LONG[0]}, {"json_schema": {"type": LONG[0]}}):
        refused(lambda options=options: vlm.generate(ASKED, **options))
