"""A conversation is what it was until an answer is complete; what is asked, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.errors import raises
from tests.runtime import toy
from tests.runtime.talking import Work, fresh, picture, texts
from vlmport.bundle import Bundle
from vlmport.errors import DeviceError, ImageError, OptionError, PromptError
from vlmport.runtime.model import VLM


@pytest.fixture
def vlm(long_bundle: Bundle) -> VLM:
    return VLM.open(long_bundle, threads=1)


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
    assert texts(chat.messages) == texts(before)
    again = chat.ask("bar", **options)
    assert again.token_ids == want[1].token_ids
    assert texts(chat.messages) == texts(plain.messages)
    prefilled = at > 1  # the first call is the prefill: interrupted after it, it does not count
    cached = again.counts["prompt_tokens"] - 1 if prefilled else want[1].counts["cached_tokens"]
    assert again.counts["cached_tokens"] == cached


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
        assert texts(chat.messages) == texts(whole.messages)
    else:
        assert chat.messages == []
        answer = chat.ask("the bar", [toy.picture(0)], max_new_tokens=6)
        assert answer.text == "".join(pieces)


def test_a_stream_is_what_ask_says(vlm: VLM) -> None:
    one, other = vlm.conversation(), vlm.conversation()
    for question, images in (("the", [toy.picture(0)]), ("bar", [])):
        assert "".join(one.stream(question, images)) == other.ask(question, images).text
        assert texts(one.messages) == texts(other.messages)
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
    said = texts(chat.messages)
    with raises(PromptError, "conversation.went-on") as caught:
        list(stream)
    assert caught.value.hint
    assert texts(chat.messages) == said
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
    cached, said = chat.cached_tokens, texts(chat.messages)
    embed = vlm.components.embed
    with monkeypatch.context() as patch:
        patch.setattr(vlm.components, "embed", lambda ids: embed(ids) * np.float32(np.nan))
        with raises(DeviceError, "device.not-finite"):
            chat.ask("bar", max_new_tokens=4)
        with raises(DeviceError, "device.not-finite"):
            list(chat.stream("bar", max_new_tokens=4))
    assert (chat.cached_tokens, texts(chat.messages)) == (cached, said)
    answer = chat.ask("bar", max_new_tokens=4)
    assert answer.token_ids == fresh(vlm, chat, max_new_tokens=4)


def test_too_long_a_conversation_is_refused_before_anything_runs(
    own_bundle: Callable[..., Bundle], work: Work
) -> None:
    vlm = VLM.open(own_bundle(context=60), threads=1)
    chat = vlm.conversation()
    chat.ask("the bar", [toy.picture(0)], max_new_tokens=4)
    work.take()
    said, cached = texts(chat.messages), chat.cached_tokens
    chat.attach(toy.picture(1))
    for ask in (chat.ask, chat.stream):
        with raises(PromptError, "conversation.full", "60"):
            ask("on the bar")
    assert work.take() == (0, [])
    assert (texts(chat.messages), chat.cached_tokens, chat.attached) == (said, cached, 1)
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
    with raises(PromptError, "prompt.image-count", "0", "1"):
        chat.ask()
    with raises(PromptError, "prompt.wrong-value", "question", "list"):
        chat.ask([picture(0)])  # type: ignore[arg-type]
    with raises(PromptError, "prompt.wrong-value", "images", "list"):
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
    said = texts(chat.messages)
    (tmp_path / "text.png").write_text("no picture")
    for image in ("absent.png", tmp_path / "text.png", 5):
        with pytest.raises(ImageError):
            chat.ask("x", [image])  # type: ignore[list-item]
        with pytest.raises(ImageError):
            chat.attach(image)  # type: ignore[arg-type]
    with raises(OptionError, "option.unknown", "'max_token'"):
        chat.stream("x", max_token=4)
    with raises(PromptError, "prompt.image-none"):
        chat.ask("x", [None])  # type: ignore[list-item]
    assert (texts(chat.messages), chat.attached) == (said, 0)


def test_a_reset_keeps_the_system_message_alone(vlm: VLM) -> None:
    chat = vlm.conversation("be brief")
    first = chat.ask("the", [toy.picture(0)])
    chat.attach(toy.picture(1))
    chat.reset()
    assert texts(chat.messages) == [("system", ["be brief"])]
    assert (chat.attached, chat.cached_tokens) == (0, 0)
    assert chat.ask("the", [toy.picture(0)]).token_ids == first.token_ids
    with raises(PromptError, "prompt.wrong-value", "5"):
        vlm.conversation(5)  # type: ignore[arg-type]


def test_what_is_handed_out_may_be_changed(vlm: VLM) -> None:
    chat = vlm.conversation()
    chat.ask("the")
    messages: Any = chat.messages
    messages[0]["content"][0]["text"] = "bar"
    messages.clear()
    assert texts(chat.messages)[0] == ("user", ["the"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"do_image_spliting": False}, "'do_image_spliting' (did you mean 'do_image_splitting'?)"),
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
