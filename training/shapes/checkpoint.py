"""distilvit2's PrefixConditioningVLM: its modules, and its folder written and read back.

Traps of the format, kept on purpose:

* The vision tower's keys have the level `vision_model.`, as transformers 4 wrote them;
  transformers 5 dropped it from the module.
* LoRA is not merged: q, k, v and o projections are stored as `base_layer`, `lora_A.default`,
  `lora_B.default` (PEFT's names), r and alpha only in config.json.
* The head is tied to the embeddings and not stored.
* No preprocessor_config.json and no generation_config.json.
"""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

END = "<|endoftext|>"
END_ID = 0
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]  # distilvit2's choice for llama
VISION_ON_DISK = "vision_encoder.vision_model."


class LinearProjection(nn.Module):
    """[B,N,vision] -> [B,N,text]; a module of its own for the key `projection.projection.*`."""

    def __init__(self, vision_size: int, text_size: int) -> None:
        super().__init__()
        self.projection = nn.Linear(vision_size, text_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.projection(features)


class PrefixVLM(nn.Module):
    """Vision tower, projection and a LoRA-wrapped language model; no BOS and no prompt."""

    def __init__(self, vision: SiglipVisionModel, language: nn.Module) -> None:
        super().__init__()
        self.vision_encoder = vision
        self.projection = LinearProjection(vision.config.hidden_size, language.config.hidden_size)
        self.language_model = language

    def prefix(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B,3,H,W] in [-1,1] -> [B,N,text hidden]; features after `post_layernorm`."""
        return self.projection(self.vision_encoder(pixel_values).last_hidden_state)

    def forward(self, pixel_values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Logits [B,S,V] of each caption token; the first is read at the last patch."""
        prefix = self.prefix(pixel_values)
        embeds = self.language_model.get_input_embeddings()(ids[:, :-1])
        inputs = torch.cat([prefix, embeds.to(prefix.dtype)], dim=1)
        base = self.language_model.base_model.model
        hidden = base.model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        return base.lm_head(hidden[:, prefix.shape[1] - 1 :])

    @torch.no_grad()
    def greedy(self, pixel_values: torch.Tensor, max_length: int) -> torch.Tensor:
        """[B, max_length] int64 ids, 0 from the end on."""
        step = {"inputs_embeds": self.prefix(pixel_values)}
        cache, ended, ids = None, torch.zeros(len(pixel_values), dtype=torch.bool), []
        for _ in range(max_length):
            output = self.language_model(**step, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            token = output.logits[:, -1].argmax(dim=-1).masked_fill(ended, END_ID)
            ended |= token == END_ID
            ids.append(token)
            step = {"input_ids": token[:, None]}
        return torch.stack(ids, dim=1)


def wrap_lora(language: LlamaForCausalLM, r: int, alpha: int, dropout: float) -> nn.Module:
    """PEFT's wrapping with distilvit2's settings; the base weights become frozen."""
    lora = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        bias="none",
        task_type=TaskType.CAUSAL_LM,
        target_modules=LORA_TARGETS,
    )
    return get_peft_model(language, lora)


def read_tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def write_checkpoint(
    folder: Path, model: PrefixVLM, config: dict[str, Any], tokenizer: Tokenizer
) -> int:
    """Write the whole folder, weights in half precision; returns its bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "model.safetensors"
    save_file(_on_disk(model), weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors writes it for its owner alone
    _write_json(folder / "config.json", config)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(config))
    _write_json(
        folder / "special_tokens_map.json",
        {"bos_token": END, "eos_token": END, "unk_token": END},
    )
    return sum(file.stat().st_size for file in folder.iterdir())


def read_checkpoint(folder: Path) -> tuple[PrefixVLM, dict[str, Any], Tokenizer]:
    """The model as stored (half precision widened to float32), its config and tokenizer."""
    config = json.loads((folder / "config.json").read_text())
    vision = SiglipVisionModel(SiglipVisionConfig(**config["vision_config"]))
    language = LlamaForCausalLM(LlamaConfig(**config["text_config"]))
    lora = (config["lora_r"], config["lora_alpha"], config["lora_dropout"])
    model = PrefixVLM(vision, wrap_lora(language, *lora))
    stored = load_file(folder / "model.safetensors")
    state = {
        name.replace(VISION_ON_DISK, "vision_encoder."): value.float()
        for name, value in stored.items()
    }
    head = "language_model.base_model.model.lm_head.weight"
    state[head] = state["language_model.base_model.model.model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model.eval(), config, read_tokenizer(folder)


def checkpoint_config(
    vision: SiglipVisionConfig,
    text: LlamaConfig,
    *,
    lora_r: int,
    lora_alpha: int,
    lora_dropout: float,
    max_length: int,
) -> dict[str, Any]:
    """Every key of distilvit2's config.json; the vision tower is trained, so not frozen."""
    return {
        "architectures": ["PrefixConditioningVLM"],
        "model_type": "prefix_conditioning_vlm",
        "vision_config": _full_config(vision),
        "text_config": _full_config(text),
        "projection_type": "linear",
        "projection_dim": 512,
        "mlp_hidden_dim": 2048,
        "freeze_vision_encoder": False,
        "vision_unfreeze_layers": vision.num_hidden_layers,
        "lora_r": lora_r,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "lora_target_modules": None,
        "max_length": max_length,
    }


def _full_config(config: LlamaConfig | SiglipVisionConfig) -> dict[str, Any]:
    """All keys, those with default values too, spelt as transformers 4 wrote them."""
    values = config.to_dict()
    for newer in ("transformers_version", "dtype"):
        values.pop(newer, None)
    rope = values.pop("rope_parameters", None)
    if rope is not None:
        values |= {"rope_theta": rope["rope_theta"], "rope_scaling": None}
    return {**values, "_name_or_path": "", "torch_dtype": "float16"}


def _on_disk(model: PrefixVLM) -> dict[str, torch.Tensor]:
    state = {
        name.replace("vision_encoder.", VISION_ON_DISK, 1): value
        for name, value in model.state_dict().items()
        if not name.endswith("lm_head.weight")
    }
    return {
        name: value.detach().to("cpu", torch.float16).contiguous()
        for name, value in sorted(state.items())
    }


def _tokenizer_config(config: dict[str, Any]) -> dict[str, Any]:
    added = {
        "content": END,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(END_ID): added},
        "bos_token": END,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "model_max_length": config["text_config"]["max_position_embeddings"],
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": END,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
