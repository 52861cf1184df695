"""shapes-smolvlm's folder, written as SmolVLM-256M-Instruct's is on the Hub, and read back."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import Idefics3Config, Idefics3ForConditionalGeneration

from training.shapes_smolvlm.prompts import (
    CHAT_TEMPLATE,
    END,
    FAKE,
    IM_END,
    IMAGE,
    LONGEST_EDGE,
    PAD,
    START,
    TILE,
    TILE_TOKENS,
)

CONTEXT = 2048
MAX_NEW_TOKENS = 40
KEPT_TEXT = (
    "attention_bias",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "tie_word_embeddings",
    "use_cache",
    "vocab_size",
)
KEPT_VISION = (
    "attention_dropout",
    "hidden_act",
    "hidden_size",
    "image_size",
    "initializer_range",
    "intermediate_size",
    "layer_norm_eps",
    "num_attention_heads",
    "num_channels",
    "num_hidden_layers",
    "patch_size",
)


def model_config(tokenizer: Tokenizer) -> Idefics3Config:
    """The sizes of the shapes captioner, an untied head as SmolVLM's."""
    ids = {token: tokenizer.token_to_id(token) for token in (PAD, START, IM_END, END, IMAGE)}
    return Idefics3Config(
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "image_size": TILE,
            "patch_size": 12,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": tokenizer.get_vocab_size(),
            "hidden_size": 128,
            "intermediate_size": 352,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": CONTEXT,
            "rope_theta": 10000.0,
            "bos_token_id": ids[START],
            "eos_token_id": ids[END],
            "pad_token_id": ids[IM_END],
            "tie_word_embeddings": False,
        },
        scale_factor=2,
        image_token_id=ids[IMAGE],
        pad_token_id=ids[IM_END],
        tie_word_embeddings=False,
    )


def write_checkpoint(
    folder: Path, model: Idefics3ForConditionalGeneration, tokenizer: Tokenizer
) -> int:
    """Write the whole folder, weights in half precision; returns its bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "model.safetensors"
    state = {
        name: value.detach().to(torch.float16).contiguous()
        for name, value in sorted(model.state_dict().items())
    }
    save_file(state, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors writes it for its owner alone
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    files = {
        "config.json": _config(model.config),
        "generation_config.json": {
            "bos_token_id": tokenizer.token_to_id(PAD),
            "eos_token_id": tokenizer.token_to_id(END),
            "max_new_tokens": MAX_NEW_TOKENS,
            "pad_token_id": tokenizer.token_to_id(IM_END),
        },
        "preprocessor_config.json": _preprocessor_config(),
        "processor_config.json": {
            "image_seq_len": TILE_TOKENS,
            "processor_class": "Idefics3Processor",
        },
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
        "special_tokens_map.json": _special_tokens(),
        "tokenizer_config.json": _tokenizer_config(tokenizer),
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    return sum(file.stat().st_size for file in folder.iterdir())


def read_checkpoint(folder: Path) -> tuple[Idefics3ForConditionalGeneration, Tokenizer]:
    """The model as stored (half precision widened to float32) and its tokenizer."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = Idefics3ForConditionalGeneration(model_config(tokenizer))
    stored = load_file(folder / "model.safetensors")
    model.load_state_dict({name: value.float() for name, value in stored.items()})
    return model.eval(), tokenizer


def _config(config: Idefics3Config) -> dict[str, Any]:
    """The keys that count, spelt as transformers 4 wrote them."""
    text, vision = config.text_config.to_dict(), config.vision_config.to_dict()
    rope = text["rope_parameters"]
    return {
        "architectures": ["Idefics3ForConditionalGeneration"],
        "image_token_id": config.image_token_id,
        "model_type": "idefics3",
        "scale_factor": config.scale_factor,
        "text_config": {
            **{key: text[key] for key in KEPT_TEXT},
            "rope_theta": rope["rope_theta"],
            "rope_scaling": None,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_cache": True,
        "vision_config": {**{key: vision[key] for key in KEPT_VISION}, "model_type": "idefics3"},
        "vocab_size": text["vocab_size"],
    }


def _preprocessor_config() -> dict[str, Any]:
    return {
        "do_convert_rgb": True,
        "do_image_splitting": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "Idefics3ImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "max_image_size": {"longest_edge": TILE},
        "processor_class": "Idefics3Processor",
        "resample": 1,
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": LONGEST_EDGE},
    }


def _special_tokens() -> dict[str, Any]:
    return {
        "additional_special_tokens": [FAKE, IMAGE, END],
        "bos_token": START,
        "eos_token": END,
        "pad_token": IM_END,
        "unk_token": PAD,
    }


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    added = {
        str(number): {
            "content": token.content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for number, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        **_special_tokens(),
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        "processor_class": "Idefics3Processor",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
