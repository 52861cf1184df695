"""The reference is right and strict by itself, before anything is compared with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from PIL import Image
from safetensors.numpy import load_file, save_file

from tests.checkpoints import write_prefix_checkpoint
from tests.errors import raises
from tests.idefics3_checkpoints import write_idefics3_checkpoint
from tests.qwen_checkpoints import write_qwen3
from vlmport.errors import (
    AdapterError,
    ConfigError,
    PromptError,
    SourceError,
    TokenizerError,
    WeightError,
)
from vlmport.parity.asked import Request
from vlmport.parity.protocol import Reference
from vlmport.parity.references import load_reference
from vlmport.parity.references.pretrained import load_processor, render
from vlmport.text.chat_template import WORKER, TemplateLimitError

IMAGE_TOKEN = 113  # one past the tiny checkpoint's vocabulary
LORA_B = "lora_B.default.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prefix_checkpoint(tmp_path_factory.mktemp("v4"))


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    return load_reference(checkpoint, image_token_id=IMAGE_TOKEN)


def picture(width: int = 50, height: int = 20) -> Image.Image:
    return Image.fromarray(np.random.default_rng(7).integers(0, 256, (height, width, 3), np.uint8))


def run(reference: Reference, image: Image.Image | None = None) -> np.ndarray:
    """Picture to the logits [T,V] of its prefix."""
    image = image or picture()
    ids = reference.image_ids(image)
    embeds = reference.embeds(ids, reference.vision_features(reference.pixels(image)))
    return reference.logits(embeds, reference.position_ids(ids))


def rewrite(folder: Path, change) -> None:
    """Apply `change` to the dict of stored tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_shapes_and_facts(reference: Reference) -> None:
    image = picture()
    ids = reference.image_ids(image)
    assert ids.tolist() == [IMAGE_TOKEN] * 25
    assert reference.pixels(image)["pixel_values"].shape == (1, 3, 30, 30)
    assert run(reference).shape == (25, 113)
    assert reference.stop_token_ids == (0,)
    assert reference.dims["num_key_value_heads"] == 2
    assert transformers.__version__ in reference.versions
    assert torch.__version__ in reference.versions


def test_pixels_are_bicubic_in_minus_one_to_one(reference: Reference) -> None:
    image = picture(640, 427)
    small = np.asarray(image.resize((30, 30), Image.Resampling.BICUBIC), np.float32)
    expected = (small / 255 - 0.5) / 0.5
    pixels = reference.pixels(image)["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_allclose(pixels, expected, atol=1e-6)


@pytest.mark.parametrize("projection", ["linear", "mlp"])
@pytest.mark.parametrize("rope_theta", [10000.0, 500.0])
def test_both_spellings_are_one_model(tmp_path: Path, projection, rope_theta: float) -> None:
    old = write_prefix_checkpoint(
        tmp_path / "v4", spelling="v4", projection=projection, text={"rope_theta": rope_theta}
    )
    new = write_prefix_checkpoint(
        tmp_path / "v5",
        spelling="v5",
        projection=projection,
        text={"rope_parameters": {"rope_theta": rope_theta, "rope_type": "default"}},
    )
    first = run(load_reference(old, image_token_id=IMAGE_TOKEN))
    second = run(load_reference(new, image_token_id=IMAGE_TOKEN))
    np.testing.assert_array_equal(first, second)


def test_shards_and_module_prefix_are_the_same_model(tmp_path: Path, reference: Reference) -> None:
    other = write_prefix_checkpoint(tmp_path, shards=3, module_prefix=True)
    np.testing.assert_array_equal(
        run(load_reference(other, image_token_id=IMAGE_TOKEN)), run(reference)
    )


@pytest.mark.parametrize(("dtype", "near"), [("F16", 2e-2), ("BF16", 2e-1)])
def test_half_precision_is_widened(tmp_path: Path, reference: Reference, dtype, near) -> None:
    other = load_reference(write_prefix_checkpoint(tmp_path, dtype=dtype), image_token_id=113)
    assert run(other).dtype == np.float32
    np.testing.assert_allclose(run(other), run(reference), atol=near)


def test_lora_is_applied_with_its_scale(tmp_path: Path, reference: Reference) -> None:
    """Against W + (α/r)·B·A computed here: zeroing B, or another alpha, changes the logits."""
    fresh = load_reference(
        write_prefix_checkpoint(tmp_path / "b0", lora="fresh"), image_token_id=113
    )
    assert np.abs(run(fresh) - run(reference)).max() > 0.1

    merged = write_prefix_checkpoint(tmp_path / "merged", lora=False)
    wrapped = load_file(write_prefix_checkpoint(tmp_path / "w") / "model.safetensors")

    def merge(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in wrapped if name.endswith(LORA_B)]:
            plain = name.replace("base_model.model.", "").replace(LORA_B, "weight")
            delta = wrapped[name] @ wrapped[name.replace("lora_B", "lora_A")]
            tensors[plain] = tensors[plain] + np.float32(8 / 4) * delta

    rewrite(merged, merge)
    plain = load_reference(merged, image_token_id=113)
    np.testing.assert_allclose(run(plain), run(reference), atol=2e-5)


def test_generate_agrees_with_a_full_pass_and_stops(reference: Reference) -> None:
    image = picture()
    ids = reference.image_ids(image)
    features = reference.vision_features(reference.pixels(image))
    embeds = reference.embeds(ids, features)
    made = reference.generate(embeds, 6, ids)
    assert len(made.tokens) == 6
    assert made.tokens.tolist() == made.logits.argmax(-1).tolist()
    whole = np.concatenate([ids, made.tokens[:-1]])
    logits = reference.logits(reference.embeds(whole, features), np.arange(len(whole)))
    np.testing.assert_allclose(made.logits, logits[len(ids) - 1 :], atol=1e-5)

    reference.stop_token_ids = (int(made.tokens[0]),)
    try:
        assert reference.generate(embeds, 6, ids).tokens.tolist() == made.tokens[:1].tolist()
    finally:
        reference.stop_token_ids = (0,)


def test_stop_ids_of_generation_config_come_first(tmp_path: Path) -> None:
    folder = write_prefix_checkpoint(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert load_reference(folder, image_token_id=113).stop_token_ids == (5, 6)


def test_image_tokens_and_features_must_be_as_many(reference: Reference) -> None:
    with raises(PromptError, "prompt.wrong-features", "2", "3"):
        reference.embeds(np.array([1, 113, 113]), np.zeros((3, 32), np.float32))


def test_every_weight_that_does_not_fit_is_named(tmp_path: Path) -> None:
    folder = write_prefix_checkpoint(tmp_path)

    def change(tensors: dict[str, np.ndarray]) -> None:
        del tensors["projection.projection.bias"]
        tensors["projection.extra"] = np.zeros(3, np.float32)
        tensors["projection.projection.weight"] = np.zeros((32, 31), np.float32)

    rewrite(folder, change)
    with pytest.raises(WeightError) as caught:
        load_reference(folder, image_token_id=113)
    text = str(caught.value)
    assert caught.value.code == "weights.unset"
    assert "1 of 87 weights missing: 'projection.projection.bias'" in text
    assert "1 surplus: 'projection.extra'" in text
    assert "'projection.projection.weight [32, 31] (expected [32, 32])'" in text


def test_a_missing_vision_tower_is_no_random_one(tmp_path: Path) -> None:
    folder = write_prefix_checkpoint(tmp_path)

    def rename(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if name.startswith("vision_encoder.")]:
            tensors["encoder." + name] = tensors.pop(name)

    rewrite(folder, rename)
    with pytest.raises(WeightError) as caught:
        load_reference(folder, image_token_id=113)
    assert "48 of 87 weights missing: 'vision_encoder." in str(caught.value)
    assert "48 surplus: 'encoder.vision_encoder." in str(caught.value)


def test_head(tmp_path: Path) -> None:
    """A tied head may be left out and may be stored as the same; another one counts."""
    untied = write_prefix_checkpoint(tmp_path / "untied", text={"tie_word_embeddings": False})
    head = "language_model.base_model.model.lm_head.weight"
    table = "language_model.base_model.model.model.embed_tokens.weight"
    own = load_reference(untied, image_token_id=113)
    tied = write_prefix_checkpoint(tmp_path / "tied")
    assert np.abs(run(own) - run(load_reference(tied, image_token_id=113))).max() > 0.1

    rewrite(untied, lambda tensors: tensors.pop(head))
    with pytest.raises(WeightError, match="lm_head"):
        load_reference(untied, image_token_id=113)

    plain = run(load_reference(tied, image_token_id=113))
    rewrite(tied, lambda tensors: tensors.update({head: tensors[table].copy()}))
    np.testing.assert_array_equal(run(load_reference(tied, image_token_id=113)), plain)
    rewrite(tied, lambda tensors: tensors.update({head: tensors[table] * 2}))
    doubled = run(load_reference(tied, image_token_id=113))
    np.testing.assert_allclose(doubled, 2 * plain, rtol=1e-5, atol=1e-5)
    rewrite(tied, lambda tensors: tensors.pop(table))  # the one that is there is both
    np.testing.assert_array_equal(run(load_reference(tied, image_token_id=113)), doubled)


def peft_folder(folder: Path, hidden: int = 32) -> Path:
    """An adapter as PEFT saves it, with B that is not zero."""
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=64,
        vocab_size=113,
        tie_word_embeddings=True,
    )
    lora = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(0)
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("inside", [True, False])
def test_adapter_adds_to_what_is_inside(tmp_path: Path, inside: bool) -> None:
    """The sum of both updates, computed here by hand on the base weight."""
    adapter = peft_folder(tmp_path / "adapter")
    folder = write_prefix_checkpoint(tmp_path / "base", lora=inside)
    without = run(load_reference(folder, image_token_id=113))
    both = run(load_reference(folder, image_token_id=113, adapter=adapter))
    assert np.abs(both - without).max() > 0.1

    pairs = load_file(adapter / "adapter_model.safetensors")
    middle = "base_model.model." if inside else ""
    leaf = "base_layer.weight" if inside else "weight"

    def merge(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in pairs if "lora_B" in name]:
            module = name.removeprefix("base_model.model.").removesuffix("lora_B.weight")
            stored = f"language_model.{middle}{module}{leaf}"
            delta = pairs[name] @ pairs[name.replace("lora_B", "lora_A")]
            tensors[stored] = tensors[stored] + np.float32(6 / 2) * delta

    rewrite(folder, merge)
    np.testing.assert_allclose(run(load_reference(folder, image_token_id=113)), both, atol=2e-5)


def test_adapter_errors(tmp_path: Path, checkpoint: Path) -> None:
    def load(adapter: Path) -> Reference:
        return load_reference(checkpoint, image_token_id=113, adapter=adapter)

    with raises(AdapterError, "adapter.no-config", "adapter_config.json"):
        load(tmp_path)
    adapter = peft_folder(tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    surplus = weights | {
        "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": weights[
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        ]
    }
    save_file(surplus, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"layers\.9"):
        load(adapter)
    with raises(AdapterError, "adapter.not-of-this-model"):
        load(peft_folder(tmp_path / "wide", hidden=64))
    (adapter / "adapter_model.safetensors").unlink()
    with raises(AdapterError, "adapter.no-weights", "adapter_model.safetensors"):
        load(adapter)


def test_config_errors(tmp_path: Path) -> None:
    with raises(SourceError, "source.no-config", "config.json"):
        load_reference(tmp_path, image_token_id=113)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        load_reference(tmp_path, image_token_id=113)
    (tmp_path / "config.json").write_text('{"model_type": "blip"}')
    with raises(ConfigError, "model.unsupported", "model_type 'blip'"):
        load_reference(tmp_path, image_token_id=113)
    gpt2 = write_prefix_checkpoint(tmp_path / "gpt2", text={"model_type": "gpt2"})
    with pytest.raises(ConfigError, match="model_type 'gpt2'"):
        load_reference(gpt2, image_token_id=113)
    empty = write_prefix_checkpoint(tmp_path / "empty")
    (empty / "model.safetensors").unlink()
    with raises(SourceError, "weights.missing-file", "'model.safetensors'"):
        load_reference(empty, image_token_id=113)


@pytest.mark.parametrize("write", [write_idefics3_checkpoint, write_qwen3])
def test_what_the_template_refuses_is_said(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    """A template for one turn; it came out as a traceback."""
    folder = write(tmp_path)
    template = "{% if messages[1] is defined %}{{ raise_exception('one turn') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(template + "{{ messages[0]['content'] }}")
    token = json.loads((folder / "config.json").read_text())["image_token_id"]
    reference = load_reference(folder, image_token_id=token)
    first, second = ({"role": role, "content": "Why?"} for role in ("user", "assistant"))
    assert len(reference.prompt_ids(Request("one", (), (first,))))
    with pytest.raises(PromptError, match=r"^'two': the chat template refuses .*: one turn$"):
        reference.prompt_ids(Request("two", (), (first, second)))


def test_a_hostile_tokenizer_is_refused_before_transformers_reads_it(tmp_path: Path) -> None:
    """It would take all memory there."""
    folder = write_idefics3_checkpoint(tmp_path / "model")
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    raw["normalizer"] = {"type": "Sequence", "normalizers": [double] * 30}
    path.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(TokenizerError) as caught:
        load_processor(folder, transformers.Idefics3Processor)
    assert caught.value.code == "tokenizer.refused"


def test_a_template_that_never_ends_is_stopped_before_transformers_renders_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_idefics3_checkpoint(tmp_path / "model")
    processor = load_processor(folder, transformers.Idefics3Processor)
    loop = "{% for a in range(99999) %}"
    processor.chat_template = loop * 3 + "{% endfor %}" * 3
    monkeypatch.setattr(WORKER, "seconds", 0.1)
    with pytest.raises(TemplateLimitError):
        render(processor, [{"role": "user", "content": []}])
