"""Tiny random checkpoints of Qwen2.5-VL's and Qwen3-VL's shape, in the real file formats.

As in tests/checkpoints.py every tensor has its real name and a value that depends on the seed and
on its plain name only: the spellings of one model hold the same numbers. The stand-in tokenizer
splits as Qwen's does; with a `tokenizer` folder the real one is taken, and the embedding is as
large.

Traps:
- transformers 4 writes Qwen2.5-VL's text settings at the top of config.json, without a
  `text_config`, and its tensors as `visual.*` and `model.*`; Qwen3-VL's have been
  `model.visual.*` and `model.language_model.*` from its first day.
- Qwen2.5's template, which is the real one as Qwen3's is, begins with a system message of its own.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tests.checkpoints import END_OF_TEXT, TORCH_NAMES, write_json, write_weights
from tests.qwen_tensors import Names, Settings, named, tensors_of
from tests.shared_testdata import ROOT

Spelling = Literal["v4", "v5"]
Dtype = Literal["F32", "F16", "BF16"]

TEMPLATES = ROOT / "testdata" / "templates"
QWEN2_5_TEMPLATE = (TEMPLATES / "qwen2.5-vl.jinja").read_text(encoding="utf-8")
QWEN3_TEMPLATE = (TEMPLATES / "qwen3-vl.jinja").read_text(encoding="utf-8")

IMAGE_PAD, STOP = "<|image_pad|>", "<|im_end|>"
SPECIAL = (
    END_OF_TEXT, "<|im_start|>", STOP, "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    IMAGE_PAD, "<|video_pad|>",
)  # fmt: skip
WORDS = (("Ċ", "Ċ"), ("Ġ", "a"), ("Ġ", "t"), ("h", "e"), ("Ġt", "he"))
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "use_cache": True,
}
TEXT_2_5: dict[str, Any] = {
    **TEXT,
    "hidden_size": 64,  # heads of 16: eight frequencies to share out
    "use_sliding_window": False,
    "sliding_window": 32768,
    "max_window_layers": 70,
}
TEXT_3: dict[str, Any] = {**TEXT, "head_dim": 16, "attention_bias": False}
ROPE_2_5: dict[str, Any] = {"type": "mrope", "mrope_section": [2, 3, 3]}
ROPE_3: dict[str, Any] = {
    "rope_type": "default",
    "mrope_interleaved": True,
    "mrope_section": [4, 2, 2],
}
VISION_2_5: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 32,
    "hidden_act": "silu",
    "intermediate_size": 40,
    "num_heads": 4,
    "patch_size": 7,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 28,  # 4 x 4 patches
    "fullatt_block_indexes": [1],
    "tokens_per_second": 2,
}
VISION_3: dict[str, Any] = {
    "depth": 4,
    "hidden_size": 32,
    "hidden_act": "gelu_pytorch_tanh",
    "intermediate_size": 40,
    "num_heads": 4,
    "in_channels": 3,
    "patch_size": 8,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 49,
    "deepstack_visual_indexes": [0, 2],
    "initializer_range": 0.02,
}
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
TOKENS = (4, 100)  # of a picture, at least and at most


def write_qwen2_5(
    folder: str | Path,
    *,
    spelling: Spelling = "v4",
    names: Names | None = None,
    dtype: Dtype = "F32",
    shards: int = 1,
    seed: int = 0,
    tokenizer: Path | None = None,
    vision: Settings | None = None,
    text: Settings | None = None,
    config: Settings | None = None,
    pixels: Settings | None = None,
    generation: Settings | None = None,
) -> Path:
    """Write a tiny Qwen2.5-VL checkpoint and return its folder.

    Args:
        spelling: how transformers 4 or 5 saves the same model: config, names of tensors, template
            and image processor.
        names: the names of the tensors, where they are not those of the spelling.
        tokenizer: a folder whose tokenizer files are taken.
        vision, text, config, pixels, generation: keys that replace or add to the settings. A tied
            head is config's `tie_word_embeddings`.
    """
    folder = Path(folder)
    known = _tokenizer(folder, tokenizer, QWEN2_5_TEMPLATE)
    inner = {**TEXT_2_5, **_text_ids(known), "vocab_size": _rows(known), **(text or {})}
    outer = {
        "model_type": "qwen2_5_vl",
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "tie_word_embeddings": False,
        **_image_ids(known),
    }
    tower = {**VISION_2_5, "out_hidden_size": inner["hidden_size"], **(vision or {})}
    rope = dict(inner.pop("rope_scaling", ROPE_2_5))
    theta = inner.pop("rope_theta", 10000.0)
    tied = {"tie_word_embeddings": (config or {}).get("tie_word_embeddings", False)}
    tensors = tensors_of("qwen2_5_vl", tower, inner | tied, seed)
    if spelling == "v4":
        settings = {**outer, **inner, "rope_theta": theta, "rope_scaling": rope}
        settings["torch_dtype"] = TORCH_NAMES[dtype]
        settings["vision_config"] = {**tower, "in_chans": 3, "spatial_patch_size": 14}
    else:
        rope = {**rope, "rope_type": "default", "rope_theta": theta}
        inner = {"model_type": "qwen2_5_vl_text", **inner, "rope_parameters": rope}
        settings = {**outer, "dtype": TORCH_NAMES[dtype], "text_config": inner}
        settings["vision_config"] = {"model_type": "qwen2_5_vl_vision", **tower, "in_channels": 3}
    settings |= dict(config or {})
    names = names or ("visual" if spelling == "v4" else "model.visual")
    factor = tower["patch_size"] * tower["spatial_merge_size"]
    preprocessor = {
        **_edges(spelling, factor),
        **_patches(tower),
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        **(pixels or {}),
    }
    write_json(folder / "config.json", settings)
    write_weights(folder, named(tensors, names), dtype=dtype, shards=shards)
    _write_rest(folder, known, preprocessor, spelling, generation)
    return folder


def write_qwen3(
    folder: str | Path,
    *,
    spelling: Spelling = "v4",
    names: Names = "model.visual",
    dtype: Dtype = "F32",
    shards: int = 1,
    seed: int = 0,
    tokenizer: Path | None = None,
    vision: Settings | None = None,
    text: Settings | None = None,
    config: Settings | None = None,
    pixels: Settings | None = None,
    generation: Settings | None = None,
) -> Path:
    """Write a tiny Qwen3-VL checkpoint and return its folder. Arguments as in write_qwen2_5."""
    folder = Path(folder)
    known = _tokenizer(folder, tokenizer, QWEN3_TEMPLATE)
    sizes = {**TEXT_3, **_text_ids(known), "vocab_size": _rows(known)}
    inner = {"model_type": "qwen3_vl_text", **sizes, **(text or {})}
    tower = {**VISION_3, "out_hidden_size": inner["hidden_size"], **(vision or {})}
    rope = dict(inner.pop("rope_scaling", ROPE_3))
    theta = inner.pop("rope_theta", 10000.0)
    tied = {"tie_word_embeddings": (config or {}).get("tie_word_embeddings", False)}
    tensors = tensors_of("qwen3_vl", tower, inner | tied, seed)
    if spelling == "v4":
        inner = {**inner, "rope_theta": theta, "rope_scaling": rope}
    else:
        inner = {**inner, "rope_parameters": {**rope, "rope_theta": theta}}
    kind = "qwen3_vl" if spelling == "v4" else "qwen3_vl_vision"
    settings = {
        "model_type": "qwen3_vl",
        "architectures": ["Qwen3VLForConditionalGeneration"],
        **_image_ids(known),
        "text_config": {"dtype": TORCH_NAMES[dtype], **inner, **tied},
        "vision_config": {"model_type": kind, **tower},
        **tied,
        **(config or {}),
    }
    factor = tower["patch_size"] * tower["spatial_merge_size"]
    preprocessor = {
        **_edges("v5", factor),  # as the Hub's own have it
        **_patches(tower),
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen3VLProcessor",
        **(pixels or {}),
    }
    write_json(folder / "config.json", settings)
    write_weights(folder, named(tensors, names), dtype=dtype, shards=shards)
    _write_rest(folder, known, preprocessor, spelling, generation)
    return folder


def _image_ids(known: Tokenizer) -> dict[str, int]:
    names = ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
    keys = ("vision_start", "vision_end", "vision", "image", "video")
    return {
        f"{key}_token_id": known.token_to_id(f"<|{name}|>")
        for key, name in zip(keys, names, strict=True)
    }


def _text_ids(known: Tokenizer) -> dict[str, int]:
    ids = {"bos_token_id": END_OF_TEXT, "eos_token_id": STOP}
    return {key: known.token_to_id(name) for key, name in ids.items()}


def _rows(known: Tokenizer) -> int:
    """Of the embedding: a few more than the tokenizer has."""
    return -(-known.get_vocab_size() // 32) * 32


def _edges(spelling: str, factor: int) -> dict[str, Any]:
    least, most = (tokens * factor * factor for tokens in TOKENS)
    if spelling == "v4":
        return {"min_pixels": least, "max_pixels": most}
    return {"size": {"shortest_edge": least, "longest_edge": most}}


def _patches(tower: Settings) -> dict[str, int]:
    return {
        "patch_size": tower["patch_size"],
        "temporal_patch_size": tower["temporal_patch_size"],
        "merge_size": tower["spatial_merge_size"],
    }


def _write_rest(
    folder: Path,
    known: Tokenizer,
    preprocessor: Settings,
    spelling: str,
    generation: Settings | None,
) -> None:
    stops = [known.token_to_id(STOP), known.token_to_id(END_OF_TEXT)]
    settings = {"eos_token_id": stops, "pad_token_id": stops[1], **(generation or {})}
    write_json(folder / "generation_config.json", settings)
    if spelling == "v4":
        write_json(folder / "preprocessor_config.json", preprocessor)
        return
    outer = {"processor_class": preprocessor["processor_class"], "image_processor": preprocessor}
    write_json(folder / "processor_config.json", outer)
    for path in folder.glob("chat_template.json"):
        path.unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = settings.pop("chat_template")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    write_json(folder / "tokenizer_config.json", settings)


# Tokenizer


def _tokenizer(folder: Path, tokenizer: Path | None, template: str) -> Tokenizer:
    """The stand-in, or the files of a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is None:
        write_qwen_tokenizer(folder, template)
    else:
        for path in (*tokenizer.glob("*.json"), *tokenizer.glob("*.jinja")):
            shutil.copyfile(path, folder / path.name)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def write_qwen_tokenizer(folder: Path, template: str) -> None:
    """A byte-level BPE after Qwen's: its way to split, the special tokens after all others."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *("".join(pair) for pair in WORDS)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [*WORDS]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"eos_token": STOP, "pad_token": END_OF_TEXT}
    write_json(folder / "special_tokens_map.json", names)
    settings = {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 4096, **names}
    settings |= {"bos_token": None, "unk_token": None, "clean_up_tokenization_spaces": False}
    settings |= {"add_prefix_space": False, "add_bos_token": False}
    write_json(folder / "tokenizer_config.json", {**settings, "chat_template": template})
