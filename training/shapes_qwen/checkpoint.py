"""The folders of the two models, written as Qwen's are on the Hub, and read back.

Traps of the format, kept on purpose:

* Qwen2.5-VL's config.json has the text settings at its top, without a `text_config`; its tensors
  are `visual.*` and `model.*`. Qwen3-VL's are `model.visual.*` and `model.language_model.*`, and
  its vision config calls itself `qwen3_vl`.
* The embeddings have more rows than the tokenizer has tokens.
* Qwen2.5-VL's processor has `min_pixels` and `max_pixels`, Qwen3-VL's a `size` with edges; both
  are areas.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration

from training.shapes_qwen.families import FAMILIES, QWEN3, Family
from training.shapes_qwen.model import CONTEXT, QwenConfig, QwenModel
from training.shapes_qwen.pictures import FRAMES, MERGE, PATCH, SHIPPED
from training.shapes_qwen.prompts import (
    END,
    IMAGE,
    PAD,
    SPECIAL,
    VIDEO,
    VISION_END,
    VISION_PAD,
    VISION_START,
    chat_template,
)

MAX_NEW_TOKENS = 40
ROWS = 32  # the embeddings have a multiple of it
KEPT_TEXT = (
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "use_cache",
    "vocab_size",
)
KEPT_VISION = (
    "depth",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "out_hidden_size",
    "patch_size",
    "spatial_merge_size",
    "temporal_patch_size",
)


def token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids that config.json names, and `vocab_size`."""
    names = {
        "bos_token_id": PAD,
        "eos_token_id": END,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    }
    ids = {key: tokenizer.token_to_id(token) for key, token in names.items()}
    return {**ids, "vocab_size": -(-tokenizer.get_vocab_size() // ROWS) * ROWS}


def write_checkpoint(folder: Path, family: Family, model: QwenModel, tokenizer: Tokenizer) -> int:
    """Write the whole folder, weights in half precision; returns its bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "model.safetensors"
    state = {
        _on_disk(name, family): value.detach().to(torch.float16).contiguous()
        for name, value in sorted(model.state_dict().items())
    }
    save_file(state, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors writes it for its owner alone
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    files = {
        "config.json": _config(family, model.config, tokenizer),
        "generation_config.json": {
            "bos_token_id": tokenizer.token_to_id(PAD),
            "eos_token_id": [tokenizer.token_to_id(END), tokenizer.token_to_id(PAD)],
            "max_new_tokens": MAX_NEW_TOKENS,
            "pad_token_id": tokenizer.token_to_id(PAD),
        },
        "preprocessor_config.json": _preprocessor_config(family),
        "chat_template.json": {"chat_template": chat_template(family)},
        "special_tokens_map.json": _special_tokens(),
        "tokenizer_config.json": _tokenizer_config(family, tokenizer),
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    return sum(file.stat().st_size for file in folder.iterdir())


def read_checkpoint(folder: Path) -> tuple[Family, QwenModel, Tokenizer]:
    """The family, the model as transformers loads it, half precision widened, and its tokenizer."""
    kinds = {
        "qwen2_5_vl": (FAMILIES["qwen2.5"], Qwen2_5_VLForConditionalGeneration),
        "qwen3_vl": (FAMILIES["qwen3"], Qwen3VLForConditionalGeneration),
    }
    family, kind = kinds[json.loads((folder / "config.json").read_text())["model_type"]]
    model, report = kind.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    wrong = [report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")]
    assert not any(wrong), wrong
    return family, model.eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))


def _on_disk(name: str, family: Family) -> str:
    if family == QWEN3:
        return name
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def _config(family: Family, config: QwenConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The keys of the Hub's config.json, spelt as transformers 4 wrote them."""
    text, vision = config.text_config.to_dict(), config.vision_config.to_dict()
    inner = {key: text[key] for key in KEPT_TEXT}
    tower = {key: vision[key] for key in KEPT_VISION}
    rope = text["rope_parameters"]
    ids = {key: getattr(config, key) for key in token_ids(tokenizer) if hasattr(config, key)}
    outer = {"tie_word_embeddings": False, **ids}
    if family == QWEN3:
        keys = ("mrope_interleaved", "mrope_section", "rope_type")
        return {
            **outer,
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "model_type": "qwen3_vl",
            "text_config": {
                **inner,
                "attention_bias": False,
                "dtype": "float16",
                "head_dim": text["head_dim"],
                "model_type": "qwen3_vl_text",
                "rope_scaling": {key: rope[key] for key in keys},
                "rope_theta": rope["rope_theta"],
                "tie_word_embeddings": False,
            },
            "vision_config": {
                **tower,
                "deepstack_visual_indexes": vision["deepstack_visual_indexes"],
                "in_channels": 3,
                "initializer_range": vision["initializer_range"],
                "model_type": "qwen3_vl",
                "num_position_embeddings": vision["num_position_embeddings"],
            },
        }
    return {
        **outer,
        **inner,
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "max_window_layers": 70,
        "model_type": "qwen2_5_vl",
        "rope_scaling": {"mrope_section": rope["mrope_section"], "type": "mrope"},
        "rope_theta": rope["rope_theta"],
        "sliding_window": CONTEXT,
        "torch_dtype": "float16",
        "use_sliding_window": False,
        "vision_config": {
            **tower,
            "fullatt_block_indexes": vision["fullatt_block_indexes"],
            "in_chans": 3,
            "spatial_patch_size": PATCH,
            "tokens_per_second": vision["tokens_per_second"],
            "window_size": vision["window_size"],
        },
        "vision_token_id": tokenizer.token_to_id(VISION_PAD),
    }


def _preprocessor_config(family: Family) -> dict[str, Any]:
    common = {
        "image_mean": list(family.mean),
        "image_std": list(family.std),
        "merge_size": MERGE,
        "patch_size": PATCH,
        "temporal_patch_size": FRAMES,
    }
    least, most = SHIPPED.pixels
    if family == QWEN3:
        return {
            **common,
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "processor_class": "Qwen3VLProcessor",
            "size": {"longest_edge": most, "shortest_edge": least},
        }
    return {
        **common,
        "image_processor_type": "Qwen2VLImageProcessor",
        "max_pixels": most,
        "min_pixels": least,
        "processor_class": "Qwen2_5_VLProcessor",
    }


def _special_tokens() -> dict[str, Any]:
    return {
        "additional_special_tokens": list(SPECIAL[1:]),
        "eos_token": END,
        "pad_token": PAD,
    }


def _tokenizer_config(family: Family, tokenizer: Tokenizer) -> dict[str, Any]:
    added = {
        str(number): {
            "content": token.content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token.special,
        }
        for number, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        **_special_tokens(),
        "bos_token": None,
        "chat_template": chat_template(family),
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": CONTEXT,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
