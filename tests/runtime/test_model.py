"""`VLM` from picture to text, on the toy bundle and on an exported prefix captioner."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.checkpoints import write_prefix_checkpoint
from tests.errors import raises
from tests.runtime import toy
from vlmport.bundle import Bundle
from vlmport.errors import BundleError, ImageError, OptionError, PromptError, TokenizerError
from vlmport.exporter import export
from vlmport.runtime.graphs.cache import KeyValueCache
from vlmport.runtime.graphs.components import Components, merge_image_features
from vlmport.runtime.model import VLM, Caption

WEIGHTS = toy.Weights.random()
ASK = [
    {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "or"}, {"type": "image"}],
    }
]


def toy_features(rgb: np.ndarray) -> np.ndarray:
    h, w = rgb.shape[0] // 4, rgb.shape[1] // 4
    tiles = rgb[: h * 4, : w * 4].reshape(h, 4, w, 4, 3).transpose(0, 2, 1, 3, 4)
    return tiles.reshape(h * w, 48) / np.float32(255) @ WEIGHTS["vision"]


def reference_caption(vlm: VLM, rgb: np.ndarray, steps: int) -> list[int]:
    """The toy's whole way in numpy: template, ids, features, greedy tokens."""
    features = toy_features(rgb)
    ids = np.array([toy.START, *[toy.IMAGE] * len(features), toy.END])
    encode = vlm.prompter.tokenizer.encode
    ids = np.concatenate([encode("user:").ids, ids, encode("\nassistant:").ids])
    embeds = WEIGHTS["embed"][ids]
    embeds[ids == toy.IMAGE] = features
    return toy.reference_greedy(WEIGHTS, embeds, steps)


@pytest.mark.parametrize(("height", "width"), [(12, 16), (9, 23), (40, 8)])
def test_a_caption_is_the_references(vlm: VLM, height: int, width: int):
    rgb = toy.picture(3, height, width)
    caption = vlm.caption(rgb)
    want = reference_caption(vlm, rgb, 12)
    stop = want.index(0) + 1 if 0 in want else 12
    assert caption.token_ids == tuple(want[:stop])
    count = (height // 4) * (width // 4)
    prompt = len(vlm.prompter.encode("user:\nassistant:")) + count + 2
    assert caption.counts == {
        "prompt_tokens": prompt, "cached_tokens": 0, "image_tokens": count,
        "new_tokens": len(caption.token_ids),
    }  # fmt: skip
    assert caption.stop_reason == ("stop" if 0 in want else "length")
    assert str(caption) == caption.text
    assert set(caption.timings) == {"image", "prefill", "decode"}
    assert all(seconds > 0 for seconds in caption.timings.values())


@settings(max_examples=10, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(4, 30), st.integers(4, 30)), min_size=1, max_size=4),
    new=st.integers(1, 12),
)
def test_pictures_together_give_what_each_gives_alone(bundle, sizes, new: int):
    pictures = [toy.picture(seed, *size) for seed, size in enumerate(sizes)]
    together = VLM.open(bundle, threads=1).caption(pictures, max_new_tokens=new)
    alone = [VLM.open(bundle, threads=1).caption(one, max_new_tokens=new) for one in pictures]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert [one.text for one in together] == [one.text for one in alone]
    assert [one.counts for one in together] == [one.counts for one in alone]


def test_many_pictures_come_in_batches(vlm: VLM, monkeypatch: pytest.MonkeyPatch):
    """Memory grows with the batch, not with the list."""
    sizes = []
    run = vlm._run
    monkeypatch.setattr(vlm, "_run", lambda prompts: sizes.append(len(prompts)) or run(prompts))
    pictures = [toy.picture(seed) for seed in range(19)]
    captions = vlm.caption(pictures, max_new_tokens=2)
    assert sizes == [8, 8, 3]
    by_two = vlm.caption_each(iter(pictures), batch_size=2, max_new_tokens=2)
    assert next(by_two).token_ids == captions[0].token_ids
    assert sizes == [8, 8, 3, 2]  # the rest waits until it is asked for
    assert [one.token_ids for one in by_two] == [one.token_ids for one in captions[1:]]
    with raises(OptionError, "option.wrong-value", "batch_size=0", "1"):
        vlm.caption_each(pictures, batch_size=0)


def test_a_bad_picture_leaves_the_others(vlm: VLM, monkeypatch: pytest.MonkeyPatch):
    good = toy.picture()
    results = list(vlm.caption_each([good, "absent.png", toy.picture(0, 80, 80), good]))
    want = vlm.caption(good).token_ids
    assert [type(one) for one in results] == [Caption, ImageError, PromptError, Caption]
    assert [one.token_ids for one in results if isinstance(one, Caption)] == [want, want]
    monkeypatch.setattr(vlm, "_run", None)  # `caption` refuses them before anything runs
    with raises(ImageError, "image.not-found", "absent.png"):
        vlm.caption([good, "absent.png"])


def test_a_list_gives_a_list(vlm: VLM):
    assert isinstance(vlm.caption(toy.picture()), Caption)
    assert vlm.caption([]) == []
    assert len(vlm.caption((toy.picture(),))) == 1


def test_a_picture_seen_again_runs_no_vision_session(vlm: VLM, monkeypatch: pytest.MonkeyPatch):
    first = vlm.caption(toy.picture(1))
    assert (vlm.features.hits, vlm.features.misses) == (0, 1)

    def forbidden(*args: object, **options: object) -> None:
        raise AssertionError("ran again")

    monkeypatch.setattr(vlm.components, "encode_image", forbidden)
    monkeypatch.setattr(vlm.components, "process_image", forbidden)
    again = vlm.caption(Image.fromarray(toy.picture(1)))
    assert again.token_ids == first.token_ids
    assert (vlm.features.hits, vlm.features.misses) == (1, 1)
    with pytest.raises(AssertionError, match="ran again"):
        vlm.caption(toy.picture(2))


def test_the_same_bytes_in_another_shape_are_another_picture(vlm: VLM):
    pixels = toy.picture(1, 8, 16)
    vlm.caption(pixels)
    vlm.caption(pixels.reshape(16, 8, 3))
    assert vlm.features.misses == 2


def test_feature_memory_is_bounded(vlm: VLM):
    one = 12 * toy.HIDDEN * 4 + 14 * 8
    vlm.features.max_bytes = 2 * one
    for seed in (0, 1, 0, 2):  # 1 is the least recently used when 2 comes
        vlm.caption(toy.picture(seed))
    assert vlm.features.nbytes == 2 * one
    misses = vlm.features.misses
    vlm.caption([toy.picture(0), toy.picture(2)])
    assert vlm.features.misses == misses
    vlm.caption(toy.picture(1))
    assert vlm.features.misses == misses + 1
    vlm.features.max_bytes = 0
    vlm.caption([toy.picture(5), toy.picture(5)])
    assert vlm.features.misses == misses + 3


def test_of_a_picture_only_what_positions_need_is_kept(vlm: VLM, monkeypatch: pytest.MonkeyPatch):
    """Pixels go once there are features; a grid, from which positions follow, stays."""
    process = vlm.components.process_image
    grid, mask = np.array([[1, 3, 4]]), np.zeros(5000, bool)

    def with_grid(*args):
        processed = process(*args)
        return dataclasses.replace(
            processed, inputs={**processed.inputs, "grid": grid, "mask": mask}
        )

    monkeypatch.setattr(vlm.components, "process_image", with_grid)
    monkeypatch.setattr(Components, "position_inputs", frozenset({"grid"}))
    picture = vlm.features.process(toy.picture())
    assert set(picture.inputs) == {"patches", "grid", "mask"}
    vlm.features.encoded(picture)
    kept = vlm.features.process(toy.picture())
    assert set(kept.inputs) == {"grid"}
    assert vlm.features.nbytes == kept.nbytes == 12 * toy.HIDDEN * 4 + 14 * 8 + 24
    vlm.features.encoded(kept)
    assert vlm.features.nbytes == kept.nbytes


def test_image_features_need_not_fit_together(vlm: VLM):
    """Two pictures of one prompt, when there is room for one of them only."""
    want = vlm.generate(ASK, [toy.picture(0), toy.picture(1)]).token_ids
    vlm.features.clear()
    vlm.features.max_bytes = 12 * toy.HIDDEN * 4 + 14 * 8
    for _ in range(2):
        assert vlm.generate(ASK, [toy.picture(0), toy.picture(1)]).token_ids == want


def test_streaming_gives_the_same_text_in_pieces(vlm: VLM):
    for seed in range(5):
        text = vlm.caption(toy.picture(seed), max_new_tokens=30).text
        pieces = list(vlm.stream(toy.picture(seed), max_new_tokens=30))
        assert "".join(pieces) == text
        assert all(pieces)
        assert len(pieces) > 1 or len(text) < 2
    chat = {"messages": ASK, "images": [toy.picture(0), toy.picture(1)]}
    assert "".join(vlm.stream(**chat)) == vlm.generate(**chat).text


def test_the_stop_token_is_in_the_ids_but_not_in_the_text(own_bundle):
    rgb = toy.picture(3)
    with VLM.open(own_bundle(stop=()), threads=1) as vlm:
        free = vlm.caption(rgb)
        later = next(token for token in free.token_ids if token != free.token_ids[0])
    with VLM.open(own_bundle(stop=(later, 112)), threads=1) as vlm:
        stopped = vlm.caption(rgb)
        assert stopped.stop_reason == "stop"
        assert stopped.token_ids == free.token_ids[: free.token_ids.index(later) + 1]
        assert stopped.text == vlm.prompter.tokenizer.decode(stopped.token_ids[:-1])
        assert "".join(vlm.stream(rgb)) == stopped.text


def test_several_pictures_and_turns(vlm: VLM):
    pictures = [toy.picture(0), toy.picture(1, 8, 8)]
    two = vlm.generate(ASK, pictures)
    assert two.counts["image_tokens"] == 12 + 4
    assert two.token_ids != vlm.generate(ASK, pictures[::-1]).token_ids
    inline = [{"role": "user", "content": [
        {"type": "image", "image": pictures[0]}, {"type": "text", "text": "or"},
        {"type": "image", "image": pictures[1]},
    ]}]  # fmt: skip
    assert vlm.generate(inline).token_ids == two.token_ids
    turns = [*ASK, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "why"}]
    longer = vlm.generate(turns, pictures)
    assert longer.counts["prompt_tokens"] > two.counts["prompt_tokens"]


def test_text_alone_opens_no_vision_session(vlm: VLM):
    answer = vlm.generate([{"role": "user", "content": "hello"}])
    assert answer.counts["image_tokens"] == 0
    assert set(vlm.components.opened) == {"embed_tokens", "decoder_model_merged"}


def test_what_is_wrong_is_said_before_anything_runs(own_bundle, tmp_path: Path):
    vlm = VLM.open(own_bundle(context=40), threads=1)
    with raises(OptionError, "option.unknown", "'max_tokens'"):
        vlm.caption(toy.picture(), max_tokens=5)
    with raises(ImageError, "image.not-found", "absent.png"):
        vlm.caption(tmp_path / "absent.png")
    with pytest.raises(PromptError) as caught:
        vlm.generate([{"role": "user", "content": [{"type": "image"}] * 2}], [toy.picture()])
    assert caught.value.code == "prompt.image-count"
    with pytest.raises(PromptError) as caught:
        vlm.stream(toy.picture(), messages=ASK)
    assert caught.value.code == "option.contradiction"
    assert "image" in str(caught.value)
    assert "messages" in str(caught.value)
    with raises(OptionError, "option.unknown", "'max_tokens'"):
        vlm.stream(toy.picture(), max_tokens=5)  # not at the first piece
    with raises(PromptError, "prompt.too-long", "40"):
        vlm.caption([toy.picture(), toy.picture(0, 30, 30)])
    assert vlm.features.misses == 1  # the large one was not encoded
    assert "decoder_model_merged" not in vlm.components.opened


def test_an_image_token_written_by_hand(own_bundle):
    """Where the placeholder differs from the image token, the latter could come by text."""
    bundle = own_bundle()
    prompt = dataclasses.replace(
        bundle.manifest.prompt, image_placeholder="<start>", placeholder_token_id=toy.START
    )
    manifest = dataclasses.replace(bundle.manifest, prompt=prompt)
    vlm = VLM.open(Bundle(bundle.folder, manifest), threads=1)
    with pytest.raises(TokenizerError) as caught:  # the toy's <start> is no added token
        vlm.generate([{"role": "user", "content": "an <image>"}])
    assert caught.value.code == "tokenizer.placeholder-in-text"


def test_properties_and_closing(bundle: Bundle):
    with VLM.open(bundle.folder, threads=1) as vlm:
        assert (vlm.precisions, vlm.precision, vlm.device) == (("fp32",), "fp32", "cpu")
        vlm.caption(toy.picture())
        assert vlm.components.opened
    assert not vlm.components.opened
    assert vlm.features.nbytes == 0
    assert vlm.caption(toy.picture()).token_ids  # it opens again


def test_bundles_that_are_not_whole(own_bundle, tmp_path: Path):
    with raises(BundleError, "bundle.no-manifest"):
        VLM.open(tmp_path)
    bundle = own_bundle()
    (bundle.folder / "tokenizer.json").unlink()
    with raises(BundleError, "bundle.not-as-listed", "tokenizer.json"):
        VLM.open(bundle.folder)
    with pytest.raises(TokenizerError):
        VLM.open(bundle)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A real export of a tiny prefix captioner."""
    folder = tmp_path_factory.mktemp("prefix")
    source = write_prefix_checkpoint(folder / "checkpoint", text={"hidden_size": 32})
    return export(source, folder / "bundle", precisions=("fp32", "q8", "q4"))


@pytest.mark.parametrize("precision", ["fp32", "q8", "q4", "auto", "vision=q4,decoder=fp32"])
def test_an_exported_captioner(exported: Bundle, precision: str):
    """Batch, stream, and the plain growing cache all give one text."""
    vlm = VLM.open(exported, precision=precision, threads=1)
    pictures = [toy.picture(seed, 20 + seed, 31) for seed in range(3)]
    alone = [vlm.caption(one) for one in pictures]
    together = vlm.caption(pictures)
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert ["".join(vlm.stream(one)) for one in pictures] == [one.text for one in alone]
    for rgb, caption in zip(pictures, alone, strict=True):
        want = growing_cache_tokens(vlm.components, rgb, len(caption.token_ids))
        assert list(caption.token_ids) == want


@pytest.mark.parametrize(("precision", "alone"), [("fp32", False), ("q8", True), ("q4", False)])
def test_a_rows_logits_do_not_depend_on_its_neighbours(
    exported: Bundle, precision: str, alone: bool
):
    """q8 scales activations by all rows of a call: two in one call would be off by 0.02 std."""
    decoder = Components.open(exported, precision=precision, threads=1).decoder
    assert decoder.row_by_row == alone
    rng = np.random.default_rng(0)
    width = exported.manifest.dims.hidden_size
    prompts = [rng.standard_normal((length, width)).astype("f4") for length in (5, 9, 3)]
    new = (
        rng.standard_normal((4, 3, 1, width)).astype("f4")
        * np.array([1, 5, 0.2], "f4")[:, None, None]
    )
    together = KeyValueCache(decoder, 3, 20, 20)
    single = [KeyValueCache(decoder, 1, 20, 20) for _ in prompts]
    for row, prompt in enumerate(prompts):
        np.testing.assert_array_equal(together.prefill(row, prompt), single[row].prefill(0, prompt))
    for step in new:
        scores = together.step(step)
        for row, cache in enumerate(single):
            want = cache.step(step[row : row + 1])[0]
            np.testing.assert_allclose(scores[row], want, rtol=0, atol=0 if alone else 2e-6)


def growing_cache_tokens(components: Components, rgb: np.ndarray, steps: int) -> list[int]:
    """Greedy tokens through `Components.decode`, without the bound cache."""
    processed = components.process_image(rgb)
    ids = processed.prompt_ids
    features = components.encode_image(processed.inputs)
    token = components.manifest.prompt.image_token_id
    embeds = merge_image_features(components.embed(ids[None])[0], ids, features, token)[None]
    past, tokens, total = None, [], 0
    for _ in range(steps):
        start, total = total, total + embeds.shape[1]
        logits, past = components.decode(
            embeds, np.ones((1, total)), np.arange(start, total)[None], past, 1
        )
        tokens.append(int(logits[0, -1].argmax()))
        embeds = components.embed(np.array([tokens[-1:]]))
    return tokens
