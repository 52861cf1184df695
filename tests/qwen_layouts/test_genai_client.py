"""onnxruntime-genai itself opens a bundle of its layout and says what PyTorch and vlmport say."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.qwen_checkpoints import write_qwen3
from tests.qwen_layouts.conftest import IMAGE, NEW_TOKENS, REQUESTS, SEEDS, Model, drawn, user
from vlmport.bundle.layouts import GENAI
from vlmport.exporter import export
from vlmport.parity.asked import Request
from vlmport.parity.references import load_reference
from vlmport.parity.truth import Truth
from vlmport.runtime.graphs.components import Components
from vlmport.runtime.layouts.genai import GenaiGraphs
from vlmport.runtime.model import VLM

try:
    import onnxruntime_genai as og
except ImportError as error:
    if os.environ.get("CI"):
        raise
    pytest.skip(f"onnxruntime-genai NOT TESTED: {error}", allow_module_level=True)

og.disable_telemetry_events()  # no network here

FILES = {"vision": "vision", "embedding": "embedding", "decoder": "model"}
SUFFIXES = {"fp32": "", "fp16": "_fp16", "q8": "_quantized"}


class Client:
    """The bundle as onnxruntime-genai runs it, at one precision."""

    def __init__(self, folder: Path, precision: str = "fp32"):
        config = og.Config(str(folder))
        suffix = SUFFIXES[precision]
        names = [f'"{part}": {{"filename": "{file}{suffix}.onnx"}}' for part, file in FILES.items()]
        config.overlay(f'{{"model": {{{", ".join(names)}}}}}')
        self.model = og.Model(config)
        self.tokenizer = og.Tokenizer(self.model)
        self.processor = self.model.create_multimodal_processor()

    def generate(self, inputs: Any, new_tokens: int = NEW_TOKENS) -> list[int]:
        """Greedy tokens: of token ids, or of what the processor gave."""
        params = og.GeneratorParams(self.model)
        params.set_search_options(do_sample=False, max_length=512)
        generator = og.Generator(self.model, params)
        if isinstance(inputs, og.NamedTensors):
            generator.set_inputs(inputs)
        else:
            generator.append_tokens(np.asarray(inputs, np.int32))
        tokens: list[int] = []
        while not generator.is_done() and len(tokens) < new_tokens:
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        return tokens


@pytest.fixture(scope="module")
def clients(models: dict[str, Model]) -> dict[str, Client]:
    return {kind: Client(model.genai.folder) for kind, model in models.items()}


def truth_of(model: Model, request: Request) -> Truth:
    token = model.hub.manifest.prompt.image_token_id
    return Truth.of(model.reference, request, NEW_TOKENS, token)


def given(ids: np.ndarray, pictures: list[dict[str, np.ndarray]], merged: int = 4) -> Any:
    """What the client's processor would give, of our own pixels."""
    tensors, grids = og.NamedTensors(), [one["image_grid_thw"] for one in pictures]
    tokens = sum(int(np.prod(grid)) for grid in grids) // merged
    tensors["input_ids"] = np.asarray(ids[None], np.int32)
    tensors["pixel_values"] = np.concatenate([one["pixel_values"] for one in pictures])
    # ONNX Runtime's int64 is C's long long, which the client does not know for one.
    tensors["image_grid_thw"] = np.concatenate(grids).astype(np.int64)
    tensors["num_image_tokens"] = np.array([tokens], np.int64)
    return tensors


def test_text_alone(model: Model, clients: dict[str, Client]) -> None:
    """The client's tokenizer, PyTorch's tokens, the runtime's."""
    request, client = REQUESTS["text alone"], clients[model.kind]
    truth = truth_of(model, request)
    with VLM.open(model.hub, precision="fp32") as vlm:
        text = vlm.prompter.render(request.messages)
        answer = vlm.generate(request.messages, [])
    ids = client.tokenizer.encode(text)
    assert [int(one) for one in ids] == truth.prompt_ids.tolist()
    tokens, made = client.generate(ids), truth.made.tokens.tolist()
    assert tokens[: len(made)] == made
    assert list(answer.token_ids)[: len(made)] == made


@pytest.mark.parametrize("size", [(70, 101), (200, 60)], ids=str)
def test_one_picture(model: Model, clients: dict[str, Client], size: tuple[int, int]) -> None:
    """Our own pixels: PyTorch's tokens, DeepStack's lanes among what they come from."""
    request = Request("one picture", drawn(size), (user(IMAGE, "What is this?"),))
    truth, client = truth_of(model, request), clients[model.kind]
    tokens = client.generate(given(truth.prompt_ids, [dict(truth.pictures[0].pixels)]))
    made = truth.made.tokens.tolist()
    assert tokens[: len(made)] == made
    with VLM.open(model.hub, precision="fp32") as vlm:
        pictures = [picture.rgb for picture in request.pictures]
        answer = vlm.generate(request.messages, pictures)
    assert list(answer.token_ids)[: len(made)] == made


def test_two_pictures_of_two_sizes(model: Model, clients: dict[str, Client]) -> None:
    request = REQUESTS["two pictures, two turns"]
    truth = truth_of(model, request)
    pictures = [dict(picture.pixels) for picture in truth.pictures]
    tokens = clients[model.kind].generate(given(truth.prompt_ids, pictures))
    made = truth.made.tokens.tolist()
    assert tokens[: len(made)] == made


def test_lanes_that_are_lost_would_show(
    models: dict[str, Model], clients: dict[str, Client]
) -> None:
    """Qwen3-VL without DeepStack says something else of this picture: so the client has it."""
    model, request = models["qwen3_vl"], REQUESTS["one picture"]
    truth, width = truth_of(model, request), model.reference.dims["hidden_size"]
    embeds = truth.embeds.copy()
    embeds[:, width:] = 0
    logits = model.reference.logits(embeds, truth.position_ids)
    first = len(truth.prompt_ids) - 1
    without = logits[first:].argmax(axis=-1)
    assert without.tolist() != truth.made.tokens.tolist()
    tokens = clients["qwen3_vl"].generate(given(truth.prompt_ids, [dict(truth.pictures[0].pixels)]))
    assert tokens[: len(truth.made.tokens)] == truth.made.tokens.tolist()


def test_its_own_processor(model: Model, clients: dict[str, Client], tmp_path: Path) -> None:
    """Where no side lies between two multiples, its pixels are ours to 1e-5 of a grey level."""
    (picture,) = drawn((101, 70))
    path = tmp_path / "picture.png"
    picture.image.save(path)
    client = clients[model.kind]
    text = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Hi<|im_end|>\n"
    made = client.processor(text, images=og.Images.open(str(path)))
    ours = Components.open(model.hub).process_image(picture.rgb)
    assert np.array_equal(made["image_grid_thw"].as_numpy(), ours.inputs["image_grid_thw"])
    apart = np.abs(made["pixel_values"].as_numpy() - ours.inputs["pixel_values"])
    assert apart.max() < 1e-6
    ids = made["input_ids"].as_numpy()[0]
    token = model.hub.manifest.prompt.image_token_id
    assert (ids == token).sum() == len(ours.prompt_ids)
    own = client.generate(made)
    assert own == client.generate(given(ids, [ours.inputs]))


def test_its_own_processor_rounds_half_up(model: Model, clients: dict[str, Client]) -> None:
    """Hugging Face rounds half to even. The day this fails, docs/bundle-format.md says too much."""
    factor = {"qwen2_5_vl": 14, "qwen3_vl": 16}[model.kind]
    side = factor * 5 // 2
    picture = Image.fromarray(np.zeros((side, side, 3), np.uint8))
    folder = model.folder / "half"
    folder.mkdir(exist_ok=True)
    picture.save(folder / "picture.png")
    images = og.Images.open(str(folder / "picture.png"))
    made = clients[model.kind].processor("<|vision_start|><|vision_end|>", images=images)
    assert made["image_grid_thw"].as_numpy().tolist() == [[1, 6, 6]]
    ours = Components.open(model.hub).process_image(np.asarray(picture))
    assert ours.inputs["image_grid_thw"].tolist() == [[1, 4, 4]]


@pytest.mark.parametrize("precision", ["fp16", "q8"])
def test_other_precisions(models: dict[str, Model], precision: str) -> None:
    """The client's tokens are those that the same graphs give when vlmport feeds them."""
    model, request = models["qwen3_vl"], REQUESTS["one picture"]
    truth = truth_of(model, request)
    graphs = GenaiGraphs.open(model.genai, precision=precision)
    pictures = [dict(picture.pixels) for picture in truth.pictures]
    embeds = graphs.embed(truth.prompt_ids, graphs.encode(pictures[0]))
    positions = graphs.positions(truth.prompt_ids, pictures)
    stops = graphs.manifest.generation.stop_token_ids
    expected, _ = graphs.greedy(embeds, positions, NEW_TOKENS, stops)
    client = Client(model.genai.folder, precision)
    tokens = client.generate(given(truth.prompt_ids, pictures))
    assert tokens[: len(expected)] == expected


@pytest.mark.parametrize("rows", [288, 269], ids=["a row to spare", "none"])
def test_no_token_of_a_prompt_is_taken_for_padding(tmp_path: Path, rows: int) -> None:
    """Where files name `<|im_end|>` as the end and no padding, it was masked in every prompt."""
    settings: dict[str, Any] = {"generation": {"eos_token_id": 263, "pad_token_id": None}}
    settings |= {"text": {"vocab_size": rows}, "seed": SEEDS["qwen3_vl"]}
    checkpoint = write_qwen3(tmp_path / "checkpoint", **settings)
    bundle = export(checkpoint, tmp_path / "bundle", precisions="fp32", layout=GENAI)
    token = bundle.manifest.prompt.image_token_id
    reference = load_reference(checkpoint, image_token_id=token)
    text = {"type": "text", "text": "Why is the sky blue?"}
    request = Request("text", (), ({"role": "user", "content": [text]},))
    truth = Truth.of(reference, request, NEW_TOKENS, token)
    assert 263 in truth.prompt_ids
    made = truth.made.tokens.tolist()
    assert Client(bundle.folder).generate(truth.prompt_ids)[: len(made)] == made

    path = bundle.folder / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["pad_token_id"] = 263
    path.write_text(json.dumps(config))
    masked = Client(bundle.folder).generate(truth.prompt_ids)
    assert masked[: len(made)] != made
    graphs = GenaiGraphs.open(bundle, precision="fp32")
    positions = graphs.positions(truth.prompt_ids, [])
    ours, _ = graphs.greedy(
        truth.embeds[: len(truth.prompt_ids)],
        positions,
        NEW_TOKENS,
        [263],
        prompt_ids=truth.prompt_ids,
    )
    assert masked[: len(ours)] == ours  # verify masks as the client does


def test_the_folder_is_opened_as_it_is(models: dict[str, Model], tmp_path: Path) -> None:
    """Without an overlay: genai_config.json names graphs that are there; no other file is read."""
    source = models["qwen2_5_vl"].genai.folder
    names = ["genai_config.json", "processor_config.json", "tokenizer.json"]
    names += ["tokenizer_config.json", "special_tokens_map.json"]
    for name in [*names, *(path.name for path in source.glob("*_quantized.onnx"))]:
        shutil.copyfile(source / name, tmp_path / name)
    model = og.Model(str(tmp_path))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=8, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(np.array([5, 6, 7], np.int32))
    generator.generate_next_token()
    assert generator.token_count() == 4
