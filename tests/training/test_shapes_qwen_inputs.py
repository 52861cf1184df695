"""The recipe of the Qwen-VL shapes models feeds them what Hugging Face's processors would."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from tests.training.qwen_shapes import Untrained, write_untrained
from training.fitting import IGNORE
from training.questions import Exchange, conversation
from training.shapes.scenes import Scene, draw, random_scene
from training.shapes_qwen.batches import Conversations, encode
from training.shapes_qwen.families import FAMILIES
from training.shapes_qwen.pictures import (
    FACTOR,
    SHIPPED,
    WIDE,
    Canvases,
    Grid,
    grid_of,
    in_merge_order,
    patches,
    random_canvas,
    resized,
)
from training.shapes_qwen.prompts import IMAGE, image_text, positions
from vlmport.families.qwen_vl.reference import QwenVLReference


@pytest.fixture(scope="module", params=list(FAMILIES))
def untrained(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Untrained:
    return write_untrained(tmp_path_factory.mktemp(request.param), FAMILIES[request.param])


@pytest.fixture(scope="module")
def reference(untrained: Untrained) -> QwenVLReference:
    return untrained.reference()


def scenes_of(seed: int, count: int) -> list[Scene]:
    rng = random.Random(seed)
    return [random_scene(rng, rng.randint(1, 3), random_canvas(rng)) for _ in range(count)]


def messages(exchanges: list[Exchange]) -> list[dict[str, Any]]:
    """A conversation as users of transformers write it."""
    written = []
    for one in exchanges:
        asked = [{"type": "image"} for _ in one.images]
        asked += [{"type": "text", "text": one.question}]
        written.append({"role": "user", "content": asked})
        answer = [{"type": "text", "text": one.answer}]
        written.append({"role": "assistant", "content": answer})
    return written


@pytest.mark.parametrize("pictures", [1, 2])
def test_prompts_are_the_processors(
    untrained: Untrained, reference: QwenVLReference, pictures: int
) -> None:
    scenes = scenes_of(pictures, pictures)
    exchanges = conversation(scenes, random.Random(0), turns=3)
    images = [draw(scene) for scene in scenes]
    texts = [image_text(grid_of(*image.size)) for image in images]
    ids, labels = encode(untrained.tokenizer, exchanges, texts, untrained.family)
    written = reference.processor.apply_chat_template(messages(exchanges), tokenize=False)
    assert reference.processor(text=[written], images=images)["input_ids"][0] == ids
    spoken = [token for token, label in zip(ids, labels, strict=True) if label != IGNORE]
    said = "".join(f"{one.answer}<|im_end|>" for one in exchanges)
    assert untrained.tokenizer.decode(spoken, skip_special_tokens=False) == said


def test_what_is_asked_is_what_is_trained(untrained: Untrained, reference: QwenVLReference) -> None:
    """The prompt with which the processor asks is the trained one up to the answer."""
    (scene,) = scenes_of(3, 1)
    (exchange,) = conversation([scene], random.Random(0), turns=1)
    text = image_text(grid_of(scene.width, scene.height))
    ids, labels = encode(untrained.tokenizer, [exchange], [text], untrained.family)
    asked = messages([exchange])[:1]
    written = reference.processor.apply_chat_template(
        asked, tokenize=False, add_generation_prompt=True
    )
    prompt = reference.processor(text=[written], images=[draw(scene)])["input_ids"][0]
    assert prompt == ids[: len(prompt)]
    assert labels[len(prompt) - 1] == IGNORE
    assert labels[len(prompt)] == ids[len(prompt)]
    assert written.startswith("<|im_start|>system\n") == bool(untrained.family.system)


def test_pictures_are_the_processors(untrained: Untrained, reference: QwenVLReference) -> None:
    images = [draw(scene) for scene in scenes_of(4, 6)]
    images += [Image.effect_noise(size, 90).convert("RGB") for size in ((60, 31), (300, 410))]
    for image in images:
        given = reference.image_processor(images=[image], return_tensors="pt")
        grid = Grid(*given["image_grid_thw"][0, 1:].tolist())
        assert grid == grid_of(*image.size)
        cut = patches(torch.from_numpy(resized(image).copy())[None], untrained.family)[0]
        torch.testing.assert_close(cut, given["pixel_values"], rtol=0, atol=1e-6)
    assert not torch.equal(cut[1], cut[2])  # noise: another order would be another picture


@pytest.mark.parametrize("canvases", [WIDE, SHIPPED])
def test_grids_are_those_of_smart_resize(canvases: Canvases) -> None:
    """Halves of a factor among them, and the least and the most there may be."""
    sides = sorted({*range(7, 1500, 37), *(FACTOR * n // 2 for n in range(1, 30))})
    for width in sides:
        for height in sides:
            if max(width, height) > 200 * min(width, height):
                continue  # refused by the processor
            high, wide = smart_resize(height, width, FACTOR, *canvases.pixels)
            assert grid_of(width, height, canvases).size == (wide, high)


@pytest.mark.parametrize(("canvases", "count"), [(WIDE, 25), (SHIPPED, 9)])
def test_canvases_have_many_grids_of_each_direction(canvases: Canvases, count: int) -> None:
    rng = random.Random(0)
    sides = [random_canvas(rng, canvases=canvases) for _ in range(20_000)]
    grids = {grid_of(*one, canvases) for one in sides}
    assert len(grids) == count
    assert {(grid.columns, grid.rows) for grid in grids} == {(*grid,) for grid in grids}
    assert max(grid.tokens for grid in grids) == 42
    for grid in list(grids)[:5]:
        assert grid_of(*random_canvas(rng, grid, canvases), canvases) == grid


@pytest.mark.parametrize("count", [0, 1, 2])
def test_positions_are_transformers(
    untrained: Untrained, reference: QwenVLReference, count: int
) -> None:
    image = untrained.tokenizer.token_to_id(IMAGE)
    grids = [Grid(8, 14), Grid(12, 10)][:count]
    ids = [1, 2, 3]
    for grid in grids:
        ids += [image] * grid.tokens + [4, 5]
    row = torch.tensor([ids])
    expected, _ = reference.model.model.get_rope_index(
        row,
        mm_token_type_ids=(row == image).int(),
        image_grid_thw=torch.tensor([[1, *grid] for grid in grids]) if grids else None,
    )
    assert np.array_equal(positions(ids, image, grids), expected[:, 0].numpy())
    if count == 2:
        turned = [Grid(grid.columns, grid.rows) for grid in grids]
        assert not np.array_equal(positions(ids, image, turned), expected[:, 0].numpy())


def test_merge_order_is_that_of_the_patches() -> None:
    """The picture's own pixels, one a patch, taken the same way."""
    grid = Grid(4, 6)
    rows = np.arange(24).reshape(4, 6)
    blocks = [rows[r : r + 2, c : c + 2].ravel() for r in (0, 2) for c in (0, 2, 4)]
    assert np.array_equal(in_merge_order(rows.reshape(-1), grid), np.concatenate(blocks))


def test_batches_are_the_same_anywhere_and_of_one_grid(untrained: Untrained) -> None:
    data = Conversations(
        "a", 3, 3, untrained.tokenizer, untrained.family, turns=3, drawn=True, canvases=WIDE
    )
    image = untrained.tokenizer.token_to_id(IMAGE)
    grids = set()
    for step in range(3):
        batch, again = data[step], data[step]
        assert torch.equal(batch.ids, again.ids)
        assert torch.equal(batch.shown[0].pixels, again.shown[0].pixels)
        tokens = sum(shown.grid.tokens for shown in batch.shown)
        assert (batch.ids == image).sum(dim=1).tolist() == [tokens] * 3
        for shown in batch.shown:
            width, height = shown.grid.size
            assert shown.pixels.shape == (3, height, width, 3)
            assert shown.answers.shape == (3, 4 * shown.grid.tokens, 6)
            grids.add(shown.grid)
    assert len(grids) > 1


def test_answers_tell_what_the_patches_show(untrained: Untrained) -> None:
    """A patch that a thing covers whole is of one colour; its neighbours in line are not."""
    data = Conversations(
        "b", 1, 24, untrained.tokenizer, untrained.family, turns=0, drawn=True, canvases=WIDE
    )
    (shown,) = data[0].shown
    cut = patches(shown.pixels, untrained.family).view(24, -1, 6, 12, 12)
    even = cut[..., 3:-3, 3:-3].flatten(3).std(dim=-1).amax(dim=-1) < 0.1
    full = (shown.geometry[..., :16] > 0.99).all(dim=-1) & (shown.answers[..., 2] > 0)
    assert full.sum() > 20
    assert even[full].all()
    assert not even[full.roll(1, dims=1)].all()
