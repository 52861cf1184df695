"""Conversations: the answers of a fresh prefill, for the work of what is new."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.errors import raises
from tests.runtime import toy
from tests.runtime.talking import CANONICAL, Work, fresh, picture
from tests.shared_testdata import shared_testdata
from vlmport.bundle import Bundle, PromptSpec
from vlmport.errors import PromptError
from vlmport.runtime.generate import Generation
from vlmport.runtime.graphs.cache import SavedRow
from vlmport.runtime.model import VLM
from vlmport.runtime.preparing import ReusablePrefix
from vlmport.runtime.prompt import Prompter


@pytest.fixture
def vlm(long_bundle: Bundle) -> VLM:
    return VLM.open(long_bundle, threads=1)


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
    decoding = vlm.preparer.decoding({})
    first = vlm.preparer.prepare(asked, images[:1], decoding)
    generation = Generation(vlm.components, [first.request])
    generation.run()
    row = generation.save(first.request)
    ids = np.concatenate([first.ids, first.request.tokens])[: row.length]
    second = vlm.preparer.assemble(
        vlm.preparer.text_ids(asked),
        [vlm.preparer.image(images[1])],
        decoding,
        0.0,
        ReusablePrefix(row, ids, first.image_rows),
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
        row = SavedRow(len(held), 0, ())
        one = ReusablePrefix(row, np.array(held), tuple(key.encode() for key in keys))
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


@pytest.mark.parametrize(
    "answer",
    ["A red square.", "The image shows:\n\n1. a cat\n2. a dog", "$\\frac{1}{2}$", "Ja, 日本語 é"],
)
def test_smolvlm_writes_history_as_it_was_generated(answer: str) -> None:
    """Its answers begin with a space, and the real template puts one before what has none."""
    folder = shared_testdata("tokenizers", "SmolVLM-256M-Instruct")
    if folder is None:
        pytest.skip("needs shared/testdata")
    spec = PromptSpec("<image>", 49190, 49190, ())
    prompter = Prompter(folder, spec)
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    said = {"role": "assistant", "content": [{"type": "text", "text": f" {answer}".strip()}]}
    again = {"role": "user", "content": [{"type": "text", "text": "Why?"}]}
    fed = np.concatenate([prompter.encode(prompter.render(asked)), prompter.encode(f" {answer}")])
    history = prompter.encode(prompter.render([*asked, said, again]))
    assert history[: len(fed)].tolist() == fed.tolist()


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
        with raises(PromptError, "template.refuses"):
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


def test_transformers_says_the_same_over_two_turns(tiled_checkpoint: Path, tiled: VLM) -> None:
    """Its own processor and `generate`, greedy, on the whole conversation."""
    import torch
    from PIL import Image

    from vlmport.parity.references import load_reference

    token = tiled.components.manifest.prompt.image_token_id
    reference: Any = load_reference(tiled_checkpoint, image_token_id=token)
    images = [Image.fromarray(picture(0)), Image.fromarray(picture(1, 20, 90))]
    chat = tiled.conversation()
    for turn, question in enumerate(["What is it?", "And this one?"]):
        answer = chat.ask(question, [images[turn]], max_new_tokens=10)
        asked = [
            {**m, "content": [{k: v for k, v in p.items() if k != "image"} for p in m["content"]]}
            for m in chat.messages[:-1]
        ]
        template = reference.processor.tokenizer.chat_template  # the processor has none of its own
        text = reference.processor.apply_chat_template(
            asked, chat_template=template, add_generation_prompt=True
        )
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
    decoding = tiled.preparer.decoding({"max_new_tokens": 9})
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
            yield tiled.preparer.prepare(messages, images, decoding, options)

    together = tiled._run(list(prompts()))
    assert len({one.counts["prompt_tokens"] for one in together}) == 4
    assert len({one.token_ids for one in together}) == 4
    for answer, prompt in zip(together, prompts(), strict=True):
        assert answer.token_ids == tiled._run([prompt])[0].token_ids
