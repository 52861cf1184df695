"""`VLM` under the options of decoding: the bundle's defaults, streams, what is returned."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.errors import raises
from tests.runtime import toy
from vlmport.bundle import Bundle
from vlmport.errors import OptionError, OptionWarning
from vlmport.runtime.generate import Generation
from vlmport.runtime.graphs.components import Components
from vlmport.runtime.model import VLM

RGB = toy.picture(0)


def with_generation(bundle: Bundle, **changes: Any) -> VLM:
    generation = dataclasses.replace(bundle.manifest.generation, **changes)
    manifest = dataclasses.replace(bundle.manifest, generation=generation)
    return VLM.open(Bundle(bundle.folder, manifest), threads=1)


def test_the_bundles_defaults_apply_and_the_call_overrides(vlm: VLM, bundle: Bundle):
    """As in transformers: generation_config.json, then the arguments; None asks for nothing."""
    plain = vlm.caption(RGB)
    penalized = vlm.caption(RGB, repetition_penalty=2.0, no_repeat_ngram_size=2)
    beams = vlm.caption(RGB, num_beams=3, length_penalty=-1.0)
    assert len({plain.token_ids, penalized.token_ids, beams.token_ids}) == 3
    defaults = {"repetition_penalty": 2.0, "no_repeat_ngram_size": 2, "temperature": 0.5}
    other = with_generation(bundle, defaults=defaults)
    assert other.caption(RGB).token_ids == penalized.token_ids
    neutral = {"repetition_penalty": 1.0, "no_repeat_ngram_size": None}
    assert other.caption(RGB, **neutral).token_ids == plain.token_ids
    drawn = other.caption(RGB, do_sample=True, seed=1, **neutral)
    assert drawn.token_ids == vlm.caption(RGB, do_sample=True, seed=1, temperature=0.5).token_ids
    other = with_generation(bundle, defaults={"num_beams": 3, "length_penalty": -1.0})
    assert other.caption(RGB).token_ids == beams.token_ids
    assert other.caption(RGB, num_beams=1).token_ids == plain.token_ids
    with raises(OptionError, "option.contradiction"):
        other.stream(RGB)
    assert "".join(other.stream(RGB, num_beams=1)) == plain.text


@pytest.mark.parametrize(
    ("defaults", "said"),
    [
        ({"temperature": 0.0, "do_sample": True, "top_k": 1}, "temperature=0.0, expected"),
        ({"guidance_scale": 3.0}, "option guidance_scale=3.0 is not supported"),
        ({"bad_words_ids": [[10**6]]}, "bad_words_ids: 1000000 not in a vocabulary"),
        ({"encoder_no_repeat_ngram_size": 2}, "this model has no prompt tokens to look at"),
        ({"min_new_tokens": 40}, "min_new_tokens=40 is more than max_new_tokens=12"),
        ({"min_length": 40}, "min_length=40 is more than max_new_tokens=12"),
    ],
)
def test_no_default_makes_a_call_without_options_fail(
    defaults: dict[str, Any], said: str, vlm: VLM, bundle: Bundle
):
    other = with_generation(bundle, defaults=defaults, processors_see_prompt=False)
    with pytest.warns(OptionWarning, match=said):
        assert other.caption(RGB).token_ids == vlm.caption(RGB).token_ids


def test_what_is_kept_of_the_prompt_for_penalties_is_the_bundles_choice(bundle: Bundle):
    """A prompt of ids that are of the vocabulary: the penalty sees them, or not."""
    ask = [{"role": "user", "content": "the red red bar on the"}]
    unseen = with_generation(bundle, processors_see_prompt=False, stop_token_ids=())
    seen = with_generation(bundle, processors_see_prompt=True, stop_token_ids=())
    assert unseen.generate(ask).token_ids == seen.generate(ask).token_ids
    one, other = (vlm.generate(ask, suppress_tokens=[], repetition_penalty=9.0, max_new_tokens=12)
                  for vlm in (unseen, seen))  # fmt: skip
    assert one.token_ids != other.token_ids
    prompt = unseen.prompter.encode(unseen.prompter.render(ask)).tolist()
    never = seen.generate(ask, encoder_no_repeat_ngram_size=1, max_new_tokens=12)
    assert not set(never.token_ids) & set(prompt)
    with raises(OptionError, "option.not-for-this-model", "encoder_no_repeat_ngram_size=1"):
        unseen.generate(ask, encoder_no_repeat_ngram_size=1)


def test_several_sequences_come_as_alternatives(vlm: VLM):
    caption = vlm.caption(RGB, num_beams=4, num_return_sequences=3)
    scores = [caption.score, *(one.score for one in caption.alternatives)]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    assert caption.seed is None
    drawn = vlm.caption(RGB, do_sample=True, num_return_sequences=3, seed=5, temperature=3.0)
    assert drawn.seed == 5
    assert drawn.score is None
    assert len({one.token_ids for one in (drawn, *drawn.alternatives)}) > 1
    assert drawn == dataclasses.replace(
        vlm.caption(RGB, do_sample=True, num_return_sequences=3, seed=5, temperature=3.0),
        timings=drawn.timings,
    )


def test_without_a_seed_each_draw_is_another_and_can_be_had_again(vlm: VLM):
    drawn = [vlm.caption(RGB, do_sample=True, temperature=3.0, top_k=0) for _ in range(4)]
    assert len({one.seed for one in drawn}) == 4
    for one in drawn:
        again = vlm.caption(RGB, do_sample=True, temperature=3.0, top_k=0, seed=one.seed)
        assert again.token_ids == one.token_ids


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(4, 30), st.integers(4, 30)), min_size=2, max_size=4),
    options=st.sampled_from(
        [
            {"num_beams": 3, "num_return_sequences": 2},
            {"num_beams": 4, "length_penalty": -2.0, "early_stopping": True},
            {"num_beams": 2, "do_sample": True, "seed": 3, "temperature": 2.0},
            {"do_sample": True, "seed": 4, "num_return_sequences": 3, "temperature": 2.0},
            {"num_beams": 3, "repetition_penalty": 1.3, "stop_strings": ["a", "("]},
            {"num_beams": 3, "regex": "[a-e]{1,4}(x|yz)"},
        ]
    ),
)
def test_uneven_prompts_together_give_what_each_gives_alone(bundle: Bundle, sizes, options):
    """Beams of one request part and end while those of others go on."""
    pictures = [toy.picture(seed, *size) for seed, size in enumerate(sizes)]
    vlm = VLM.open(bundle, threads=1)
    together = vlm.caption(pictures, **options)
    for rgb, caption in zip(pictures, together, strict=True):
        alone = vlm.caption(rgb, **options)
        for one, other in zip(
            (caption, *caption.alternatives), (alone, *alone.alternatives), strict=True
        ):
            assert (one.token_ids, one.text, one.stop_reason) == (
                other.token_ids, other.text, other.stop_reason,
            )  # fmt: skip
            assert one.score == (other.score and pytest.approx(other.score, abs=1e-4))


STREAMED: list[dict[str, Any]] = [
    {"do_sample": True, "seed": 2, "temperature": 1.5, "max_new_tokens": 40},
    {"prompt_lookup_num_tokens": 4, "max_new_tokens": 60},
    {"repetition_penalty": 1.5, "max_new_tokens": 40},
    {"regex": "[a-z]{5} (on|the)+!", "max_new_tokens": 40},
    {"json_schema": {"type": "array", "items": {"type": "integer"}, "maxItems": 4}},
    {"regex": "(ab|cd)+", "do_sample": True, "seed": 7, "stop_strings": ["bc", "dd"]},
]


@pytest.mark.parametrize("options", STREAMED, ids=lambda options: next(iter(options)))
@pytest.mark.filterwarnings("ignore::vlmport.errors.AnswerWarning")  # some JSON is cut
def test_what_is_streamed_is_what_is_returned(vlm: VLM, options: dict[str, Any]):
    caption = vlm.caption(RGB, **options)
    pieces = list(vlm.stream(RGB, **options))
    assert "".join(pieces) == caption.text
    assert all(pieces)
    assert not any("\ufffd" in piece for piece in pieces[:-1]) or "\ufffd" in caption.text


def test_a_stop_string_ends_the_text_but_its_tokens_stay(vlm: VLM):
    free = vlm.caption(RGB, max_new_tokens=12)
    for at in range(1, len(free.text) - 2):
        stop = free.text[at : at + 2]
        if "\ufffd" in stop:
            continue
        caption = vlm.caption(RGB, max_new_tokens=12, stop_strings=[stop])
        assert caption.stop_reason == "stop_string"
        assert caption.text == free.text[: free.text.index(stop)]
        assert caption.token_ids == free.token_ids[: len(caption.token_ids)]
        assert "".join(vlm.stream(RGB, max_new_tokens=12, stop_strings=stop)) == caption.text


def test_json_of_a_schema_from_any_model(vlm: VLM):
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "maximum": 9, "minimum": 0}},
        "required": ["n"],
        "additionalProperties": False,
    }
    for options in ({}, {"num_beams": 3, "num_return_sequences": 3}, {"do_sample": True}):
        caption = vlm.caption(RGB, json_schema=schema, max_new_tokens=40, **options)
        for one in (caption, *caption.alternatives):
            assert set(json.loads(one.text)) == {"n"}
            assert one.stop_reason == "stop"
    beams = vlm.caption(RGB, regex="(yes|no)", num_beams=5, num_return_sequences=5)
    assert {one.text for one in (beams, *beams.alternatives)} <= {"yes", "no"}


def test_what_is_wrong_is_said_before_a_picture_is_read(vlm: VLM):
    for options in ({"regex": "(a"}, {"top_k": 4}, {"num_beams": 99}, {"json_schema": 3}):
        for ask in (vlm.caption, vlm.stream, lambda rgb, **o: list(vlm.caption_each([rgb], **o))):
            with pytest.raises(OptionError):
                ask("absent.png", **options)
    assert not vlm.components.opened


@pytest.fixture
def generations(monkeypatch: pytest.MonkeyPatch) -> list[Generation]:
    """Every generation that is begun."""
    made: list[Generation] = []
    init = Generation.__init__

    def remembered(self: Generation, *args: Any) -> None:
        init(self, *args)
        made.append(self)

    monkeypatch.setattr(Generation, "__init__", remembered)
    return made


@pytest.mark.parametrize("after", range(4))
def test_a_stream_is_cancelled_at_any_piece(vlm: VLM, generations, after: int, monkeypatch):
    calls = []
    embed = vlm.components.embed
    monkeypatch.setattr(vlm.components, "embed", lambda ids: calls.append(ids.shape) or embed(ids))
    pieces = vlm.stream(RGB, max_new_tokens=100, min_new_tokens=100)
    begun = len(calls)
    for _ in range(after):
        next(pieces)
    pieces.close()
    count = len(calls)
    assert count - begun < 20
    assert list(pieces) == []
    assert len(calls) == count
    for generation in generations:
        assert generation.done
        assert generation.requests == []


def test_ctrl_c_in_a_stream_ends_it(vlm: VLM, monkeypatch: pytest.MonkeyPatch):
    session = vlm.components.decoder.session
    original, calls = session.run_with_iobinding, []

    def interrupted(binding: object) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        original(binding)

    monkeypatch.setattr(session, "run_with_iobinding", interrupted)
    pieces = vlm.stream(RGB, max_new_tokens=50, min_new_tokens=50)
    with pytest.raises(KeyboardInterrupt):
        list(pieces)
    monkeypatch.undo()
    assert "".join(vlm.stream(RGB)) == vlm.caption(RGB).text  # the model is none the worse


def test_scores_of_a_broken_decoder_are_an_error_in_beams_too(
    own_bundle: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
):
    from vlmport.errors import DeviceError

    vlm = VLM.open(own_bundle(), threads=1)
    embed = Components.embed

    def broken(self: Components, ids: np.ndarray) -> np.ndarray:
        return embed(self, ids) * np.float32(np.nan if ids.shape[1] == 1 else 1)

    monkeypatch.setattr(Components, "embed", broken)
    for options in ({}, {"num_beams": 2}, {"do_sample": True}):
        with raises(DeviceError, "device.not-finite", "1"):
            vlm.caption(RGB, min_new_tokens=4, **options)
