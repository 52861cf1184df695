"""Tiny random checkpoints of Idefics3's and SmolVLM's shape, in the real file formats.

As in tests/checkpoints.py every tensor has its real name and a value that depends on the seed and
the name only. The stand-in tokenizer splits as SmolVLM's does; with a `tokenizer` folder the real
one is taken, and the embedding is as large.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.checkpoints import (
    END_OF_TEXT,
    ROPE,
    TEXT,
    TORCH_NAMES,
    VISION,
    llama_shapes,
    siglip_shapes,
    values,
    write_json,
    write_weights,
)

TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
SIDE, EDGE = 32, 96  # of a tile, and of the longest edge: up to 3 x 3 tiles
PREPROCESSOR: dict[str, Any] = {
    "image_processor_type": "Idefics3ImageProcessor",
    "processor_class": "Idefics3Processor",
    "do_convert_rgb": True,
    "do_image_splitting": True,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "max_image_size": {"longest_edge": SIDE},
    "resample": 1,
    "rescale_factor": 1 / 255,
    "size": {"longest_edge": EDGE},
}
STOP = "<end_of_utterance>"


def write_idefics3_checkpoint(
    folder: str | Path,
    *,
    model_type: Literal["idefics3", "smolvlm"] = "idefics3",
    spelling: Literal["v4", "v5"] = "v4",
    dtype: Literal["F32", "F16", "BF16"] = "F32",
    shards: int = 1,
    seed: int = 4,
    markers: int = 4,
    tokenizer: Path | None = None,
    vision: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    pixels: Mapping[str, Any] | None = None,
) -> Path:
    """Write a tiny checkpoint and return its folder.

    Args:
        seed: with 4 no text ends early, and with 0 some say the image token.
        spelling: how transformers 4 or 5 saves the same model: in 5 the template has a file of its
            own, and the image processor's settings are part of processor_config.json.
        markers: the stand-in tokenizer knows so many rows and columns of tiles.
        tokenizer: a folder whose tokenizer files are taken.
        vision, text, config, pixels: keys that replace or add to the settings.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is None:
        write_marked_tokenizer(folder, markers)
    else:
        for path in tokenizer.glob("*.json"):
            shutil.copyfile(path, folder / path.name)
    known = Tokenizer.from_file(str(folder / "tokenizer.json"))
    dtype_key = "torch_dtype" if spelling == "v4" else "dtype"
    rows = -(-known.get_vocab_size() // 32) * 32  # a few more than the tokenizer has
    settings: dict[str, Any] = {
        "model_type": model_type,
        "architectures": ["Idefics3ForConditionalGeneration"],
        "image_token_id": known.token_to_id("<image>"),
        "scale_factor": 2,
        "tie_word_embeddings": False,
        "use_cache": True,
        dtype_key: TORCH_NAMES[dtype],
        "vision_config": {
            **VISION,
            "model_type": model_type if spelling == "v4" else f"{model_type}_vision",
            "image_size": SIDE,
            "patch_size": 8,
            **(vision or {}),
        },
        "text_config": {
            **TEXT,
            **ROPE[spelling],
            "vocab_size": rows,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
            **(text or {}),
        },
        **(config or {}),
    }
    settings["vision_config"].pop("vision_use_head")
    preprocessor = PREPROCESSOR | dict(pixels or {})
    write_json(folder / "config.json", settings)
    write_weights(folder, idefics3_tensors(settings, seed), dtype=dtype, shards=shards)
    stop = known.token_to_id(STOP)
    write_json(folder / "generation_config.json", {"eos_token_id": stop, "pad_token_id": 2})
    _write_processor(folder, settings, preprocessor, spelling)
    return folder


def _write_processor(
    folder: Path, settings: Mapping[str, Any], preprocessor: dict[str, Any], spelling: str
) -> None:
    patches = (
        preprocessor["max_image_size"]["longest_edge"] // settings["vision_config"]["patch_size"]
    )
    count = (patches // settings["scale_factor"]) ** 2
    processor: dict[str, Any] = {"processor_class": "Idefics3Processor", "image_seq_len": count}
    if spelling == "v4":
        write_json(folder / "preprocessor_config.json", preprocessor)
        write_json(folder / "processor_config.json", processor)
        return
    write_json(folder / "processor_config.json", processor | {"image_processor": preprocessor})
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = tokenizer_config.pop("chat_template")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    write_json(folder / "tokenizer_config.json", tokenizer_config)


def idefics3_tensors(config: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """All tensors, float32, under the names that checkpoints store."""
    vision, text = config["vision_config"], config["text_config"]
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in siglip_shapes({**vision, "vision_use_head": False}).items():
        shapes[f"model.vision_model.{name}"] = shape
    rows = vision["hidden_size"] * config["scale_factor"] ** 2
    shapes["model.connector.modality_projection.proj.weight"] = (text["hidden_size"], rows)
    tied = {"tie_word_embeddings": config["tie_word_embeddings"]}
    for name, shape in llama_shapes({**text, **tied}).items():
        shapes[name.replace("model.", "model.text_model.", 1)] = shape
    return {name: values(name, shape, seed) for name, shape in shapes.items()}


def write_marked_tokenizer(folder: Path, markers: int, *, joins_newlines: bool = True) -> None:
    """A byte-level BPE after SmolVLM's: digits apart, two newlines one token, special tokens for
    `markers` rows and columns of tiles."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [END_OF_TEXT, "<|im_start|>", "<|im_end|>", *alphabet, "ĊĊ", "Ġa", "Ġt", "he"]
    merges = [("Ċ", "Ċ"), ("Ġ", "a"), ("Ġ", "t"), ("h", "e")]
    tokenizer = Tokenizer(
        models.BPE({t: i for i, t in enumerate(tokens)}, merges if joins_newlines else merges[1:])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    grid = [f"<row_{r + 1}_col_{c + 1}>" for r in range(markers) for c in range(markers)]
    special = [*tokens[:3], "<global-img>", *grid, "<fake_token_around_image>", "<image>", STOP]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<|im_start|>", "eos_token": STOP, "pad_token": "<|im_end|>"}
    names["unk_token"] = END_OF_TEXT
    write_json(folder / "special_tokens_map.json", names)
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 2048, **names}
    settings |= {"add_prefix_space": False, "clean_up_tokenization_spaces": False}
    write_json(folder / "tokenizer_config.json", {**settings, "chat_template": TEMPLATE})
