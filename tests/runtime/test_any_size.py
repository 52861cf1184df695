"""Pictures of any size, with positions in time, height and width: in prompts, turns and batches.

Each way to decode is held against one pass without a cache over all that was said, whose positions
the bundle's graph gives for the whole. That pass is held against transformers by `verify`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.errors import raises
from tests.qwen_checkpoints import write_qwen2_5, write_qwen3
from tests.runtime.talking import Work, fresh, picture
from vlmport.bundle import Bundle
from vlmport.errors import PromptError
from vlmport.exporter import export
from vlmport.runtime.graphs.components import POSITIONS, VISION, Components, merge_image_features
from vlmport.runtime.messages import check_messages
from vlmport.runtime.model import VLM
from vlmport.runtime.response import Answer

WRITERS = {"qwen2_5_vl": write_qwen2_5, "qwen3_vl": write_qwen3}
SIZES = [(40, 60), (75, 30), (64, 64), (33, 120)]
TOLERANCE = 1e-3
CANONICAL = "[b-d]{4}"  # a text that these templates write as it was generated


@pytest.fixture(scope="module", params=WRITERS)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp(request.param)
    return export(WRITERS[request.param](folder / "c"), folder / "b", precisions="fp32")


@pytest.fixture
def vlm(bundle: Bundle) -> VLM:
    return VLM.open(bundle, threads=1)


def asked(text: str, pictures: int = 1) -> dict[str, Any]:
    parts = [*[{"type": "image"}] * pictures, {"type": "text", "text": text}]
    return {"role": "user", "content": parts}


def full_pass(
    vlm: VLM, messages: Sequence[Any], images: Sequence[np.ndarray], tokens: Sequence[int]
) -> np.ndarray:
    """Log-probabilities f64[n, V] of each of these tokens, from one pass over prompt and tokens."""
    chat = check_messages(messages, list(images))
    pictures = [vlm.features.encoded(vlm.preparer.image(one)) for one in chat.images]
    text = vlm.preparer.text_ids(chat.messages)
    prompt = vlm.prompter.splice(text, [one.prompt_ids for one in pictures])
    ids = np.concatenate([prompt, np.array(tokens[:-1], np.int64)])
    components = vlm.components
    embeds = components.embed(ids[None])[0]
    rows = np.concatenate([np.zeros((0, embeds.shape[1]), "f4"), *(one.rows for one in pictures)])
    embeds = merge_image_features(embeds, ids, rows, components.manifest.prompt.image_token_id)
    positions = components.position_ids(ids, [one.inputs for one in pictures]).ids
    ones = np.ones((1, len(ids)), np.int64)
    logits, _ = components.decode(embeds[None], ones, positions[:, None])
    logits = logits[0, len(prompt) - 1 :].astype("f8")
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def assert_as_one_pass(
    vlm: VLM, answer: Answer, messages: Sequence[Any], images: Sequence[np.ndarray] = ()
) -> None:
    truth = full_pass(vlm, messages, images, answer.token_ids)
    truth = truth[np.arange(len(answer.token_ids)), list(answer.token_ids)]
    assert answer.logprobs is not None
    found = [one.logprob for one in answer.logprobs]
    np.testing.assert_allclose(found, truth, atol=TOLERANCE)


GREEDY: dict[str, Any] = {"max_new_tokens": 8, "logprobs": 0}


@pytest.mark.parametrize("pictures", [0, 1, 2, 3])
def test_a_prompt(vlm: VLM, pictures: int) -> None:
    images = [picture(n, *SIZES[n]) for n in range(pictures)]
    messages = [asked("what is it?", pictures)]
    answer = vlm.generate(messages, images, **GREEDY)
    assert_as_one_pass(vlm, answer, messages, images)
    pieces = list(vlm.stream(messages=messages, images=images, max_new_tokens=8))
    assert "".join(pieces) == answer.text


WAYS: dict[str, dict[str, Any]] = {
    "drawn": {"do_sample": True, "seed": 3, "temperature": 3.0},
    "several": {"do_sample": True, "seed": 3, "num_return_sequences": 3},
    "guessed": {"prompt_lookup_num_tokens": 4},
    "beams": {"num_beams": 3, "num_return_sequences": 3},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_other_ways_to_decode(vlm: VLM, way: dict[str, Any]) -> None:
    """Rows that part keep the positions of their prompt."""
    messages, images = [asked("and?", 2)], [picture(0, *SIZES[0]), picture(1, *SIZES[1])]
    answer = vlm.generate(messages, images, **GREEDY, **way)
    for one in (answer, *answer.alternatives):
        truth = full_pass(vlm, messages, images, one.token_ids)
        truth = truth[np.arange(len(one.token_ids)), list(one.token_ids)]
        assert one.logprobs is not None
        np.testing.assert_allclose([p.logprob for p in one.logprobs], truth, atol=TOLERANCE)


def test_a_batch_of_unequal_pictures(vlm: VLM) -> None:
    images = [picture(n, *size) for n, size in enumerate(SIZES)]
    captions = vlm.caption(images, **GREEDY)
    for image, caption in zip(images, captions, strict=True):
        assert_as_one_pass(vlm, caption, vlm.components.manifest.prompt.caption, [image])


def test_turns_go_on_from_the_cache(vlm: VLM, work: Work) -> None:
    """A picture in the first turn, none in the second, two in the third; nothing is done twice."""
    chat = vlm.conversation()
    options = {**GREEDY, "regex": CANONICAL}
    for question, images, encoded in (
        ("one", [picture(0, *SIZES[0])], 1),
        ("two", [], 0),
        ("three", [picture(1, *SIZES[1]), picture(0, *SIZES[0])], 1),
        ("four", [], 0),
    ):
        held = chat.cached_tokens
        answer = chat.ask(question, images, **options)
        tiles, prefilled = work.take()
        assert tiles == encoded
        assert answer.counts["cached_tokens"] == held
        assert sum(prefilled) == answer.counts["prompt_tokens"] - answer.counts["cached_tokens"]
        assert answer.token_ids == fresh(vlm, chat, **options)
        work.take()
        assert_as_one_pass(vlm, answer, chat.messages[:-1])


@pytest.mark.parametrize("broken", ["offset", "columns"])
def test_the_comparison_can_fail(vlm: VLM, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """Steps that count tokens, and a turn that is placed as if it began the conversation."""
    chat = vlm.conversation()
    chat.ask("one", [picture(0, *SIZES[0])], regex=CANONICAL)
    from vlmport.runtime import preparing

    plain = preparing.new_request

    def wrong(*args: Any, positions: np.ndarray, rope_delta: int, **rest: Any) -> Any:
        if broken == "offset":
            return plain(*args, positions=positions, rope_delta=0, **rest)
        return plain(*args, positions=positions - positions[:, :1], rope_delta=rope_delta, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(preparing, "new_request", wrong)
        answer = chat.ask("two", **GREEDY)
    with pytest.raises(AssertionError):
        assert_as_one_pass(vlm, answer, chat.messages[:-1])


def test_a_picture_keeps_what_positions_need(vlm: VLM) -> None:
    seen = vlm.features.encoded(vlm.preparer.image(picture(0)))
    assert set(seen.inputs) == {"image_grid_thw"}
    assert vlm.components.position_inputs == {"image_grid_thw"}


def test_text_alone_opens_no_tower(vlm: VLM) -> None:
    vlm.generate([asked("hello", 0)], **GREEDY)
    assert VISION not in vlm.components.opened
    assert POSITIONS in vlm.components.opened


def test_grids_that_do_not_fit(vlm: VLM) -> None:
    components = vlm.components
    one, other = (components.process_image(picture(0, *size)) for size in SIZES[:2])
    mixed = {**one.inputs, "image_grid_thw": other.inputs["image_grid_thw"]}
    with raises(
        PromptError, "prompt.refused", "vision_encoder", "image_grid_thw", "pixel_values"
    ) as caught:
        components.encode_image(mixed)
    assert "image_processor" in caught.value.hint
    with raises(PromptError, "prompt.refused", "image_grid_thw", "input_ids") as caught:
        components.position_ids(one.prompt_ids, [mixed])
    assert "prompt_ids" in caught.value.hint
    with raises(PromptError, "prompt.refused", "position_ids", "image_grid_thw", "input_ids"):
        components.position_ids(one.prompt_ids, [])


def test_more_image_tokens_than_the_context_holds(
    bundle: Bundle, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Refused before anything is encoded."""
    writer = WRITERS[bundle.manifest.family]
    checkpoint = writer(tmp_path / "c", text={"max_position_embeddings": 120})
    vlm = VLM.open(export(checkpoint, tmp_path / "b", precisions="fp32"), threads=1)
    vlm.caption(picture(0, 40, 60), max_new_tokens=2)
    vlm = VLM.open(vlm.components.bundle, threads=1)
    with raises(PromptError, "prompt.too-long", "120") as caught:
        vlm.generate([asked("which?", 3)], [picture(n, 300, 300) for n in range(3)])
    assert "smaller images" in str(caught.value.hint)
    assert vlm.components.opened == ("image_processor",)


@pytest.mark.parametrize("kind", ["video", "video_url"])
def test_videos_are_refused(vlm: VLM, kind: str) -> None:
    parts = [{"type": kind, kind: "film.mp4"}, {"type": "text", "text": "what happens?"}]
    with raises(PromptError, "prompt.unknown-part") as caught:
        vlm.generate([{"role": "user", "content": parts}])
    assert "frames as images" in str(caught.value.hint)


def test_the_probe_runs(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """And sees positions that are not the graph's."""
    from vlmport.runtime.graphs.positions import Positions, counted
    from vlmport.runtime.probe import check_golden

    assert check_golden(Components.open(bundle, threads=1)).ok

    def flat(self: Components, ids: np.ndarray, pictures: Sequence[Any] = ()) -> Positions:
        return Positions(np.broadcast_to(counted(ids).ids, (3, len(ids))))

    monkeypatch.setattr(Components, "position_ids", flat)
    assert not check_golden(Components.open(bundle, threads=1)).ok
