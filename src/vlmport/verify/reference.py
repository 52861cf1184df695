"""The truth that a bundle is compared with: Hugging Face transformers on PyTorch.

This is the only file of the package that imports torch, transformers and peft, and it shares no
code with the export: it reads config.json and the safetensors itself, builds the model from
Hugging Face's own classes, and leaves LoRA to PEFT, unmerged. A mistake in the export's reading,
merging or arithmetic can therefore not repeat itself here.

Traps:

* transformers 5 has no `vision_model` level in SiglipVisionModel; checkpoints may have it.
* A key that does not fit is an error. Loaded with `strict=False`, a checkpoint of the other
  spelling leaves the vision tower random and nobody is told.
* distilvit2 adds no BOS and no prompt: token 0 comes from the logits of the last patch.

B batch, S sequence, T image tokens, D hidden, V vocabulary, N new tokens.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import peft
import PIL
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from vlmport.errors import AdapterError, ConfigError, PromptError, SourceError, WeightError
from vlmport.errors import some_names as some
from vlmport.verify.configs import llama_config, read_config, stop_token_ids
from vlmport.verify.protocol import Generated, Reference

if TYPE_CHECKING:
    from jaxtyping import Float, Int

WEIGHTS_A_THREAD = 10_000_000  # for fewer, waking another thread costs more than it brings
VISION = "vision_encoder."
ADAPTER = "on_top"  # what PEFT shall call the adapter that is given separately
DECODER_DIMS = (
    "hidden_size",
    "num_hidden_layers",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")  # distilvit2's choice for llama


Method = TypeVar("Method", bound=Callable[..., Any])


def quietly(method: Method) -> Method:
    """Without gradients, on the reference's own number of threads; the caller's is put back."""

    @functools.wraps(method)
    def run(self: Any, *args: Any) -> Any:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with torch.no_grad():
                return method(self, *args)
        finally:
            torch.set_num_threads(before)

    return cast(Method, run)


def load_reference(
    folder: str | Path, *, image_token_id: int, adapter: str | Path | None = None
) -> Reference:
    """The reference of a checkpoint folder, by its config.json's model_type.

    Args:
        image_token_id: the id that stands for a patch in prompts. distilvit2 has none, so the
            bundle's is taken; nothing else is taken from a bundle.
        adapter: a PEFT folder that is put on top, after whatever LoRA the checkpoint holds.

    Raises SourceError, ConfigError, WeightError or AdapterError.
    """
    folder = Path(folder)
    config = read_config(folder)
    family = config.get("model_type")
    if not isinstance(family, str) or family not in REFERENCES:
        raise ConfigError(
            f"{folder / 'config.json'}: no reference for model_type {family!r}",
            hint=f"known: {', '.join(REFERENCES)}",
        )
    return REFERENCES[family](folder, config, image_token_id, adapter)


class PrefixReference:
    """distilvit2: SigLIP's patches, projected, are the prefix of a llama under LoRA.

    Source: the modelling code of distilvit2 (`PrefixConditioningVLM`), in transformers' modules.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        image_token_id: int,
        adapter: str | Path | None = None,
    ):
        # A whole SigLIP config holds both towers'.
        raw_vision = config["vision_config"].get("vision_config", config["vision_config"])
        vision = transformers.SiglipVisionConfig(**raw_vision)
        text = transformers.LlamaConfig(**llama_config(config["text_config"]))
        state = _read_state(folder)
        lora = any(".lora_A." in name for name in state)
        self.model = PrefixModel(vision, text, config, lora=lora)
        load_strictly(self.model, state, tied_head=bool(text.tie_word_embeddings), where=folder)
        if adapter is not None:
            self.model.language_model = add_adapter(self.model.language_model, Path(adapter))
        self.model.eval().requires_grad_(False)
        self.threads = useful_threads(sum(weight.numel() for weight in self.model.parameters()))
        self.image_token_id = image_token_id
        size, patch = config_int(vision, "image_size"), config_int(vision, "patch_size")
        self.image_tokens = (size // patch) ** 2
        self.processor = _siglip_processor(folder, size)
        self.grey_level = self.processor.rescale_factor / min(self.processor.image_std)
        self.stop_token_ids = stop_token_ids(folder, text.eos_token_id)
        self.dims: Mapping[str, int] = {name: config_int(text, name) for name in DECODER_DIMS}
        self.versions = (
            f"transformers {transformers.__version__}, torch {torch.__version__}, "
            f"peft {peft.__version__}, Pillow {PIL.__version__}"
        )

    def prompt_ids(self, image: Image.Image) -> Int[np.ndarray, " T"]:
        """One id a patch; the picture's own size does not matter."""
        return np.full(self.image_tokens, self.image_token_id, np.int64)

    def pixels(self, image: Image.Image) -> dict[str, np.ndarray]:
        """`pixel_values` float32 [1,3,size,size] in [-1,1], by SigLIP's processor on Pillow."""
        return {"pixel_values": self.processor(images=image, return_tensors="np")["pixel_values"]}

    @quietly
    def vision_features(self, inputs: Mapping[str, np.ndarray]) -> Float[np.ndarray, "T D"]:
        """The last hidden state, after post_layernorm, projected to the decoder's width."""
        pixels = torch.from_numpy(np.asarray(inputs["pixel_values"], np.float32))
        hidden = self.model.vision_encoder(pixel_values=pixels).last_hidden_state
        return self.model.projection(hidden)[0].numpy()

    @quietly
    def embeds(
        self, ids: Int[np.ndarray, " S"], features: Float[np.ndarray, "T D"]
    ) -> Float[np.ndarray, "S D"]:
        """Raises PromptError unless there are as many image tokens as features."""
        image = np.asarray(ids) == self.image_token_id
        if image.sum() != len(features):
            raise PromptError(f"{image.sum()} image tokens in the prompt, {len(features)} features")
        table = self.model.language_model.get_input_embeddings()
        embeds = table(torch.from_numpy(np.where(image, 0, ids))).numpy()
        embeds[image] = features
        return embeds

    def position_ids(self, ids: Int[np.ndarray, " S"]) -> Int[np.ndarray, " S"]:
        """0 … S-1, as a llama counts when nobody gives it positions."""
        return np.arange(len(ids), dtype=np.int64)

    @quietly
    def logits(
        self, embeds: Float[np.ndarray, "S D"], position_ids: Int[np.ndarray, " S"]
    ) -> Float[np.ndarray, "S V"]:
        """One causal pass over the whole sequence, without a cache."""
        output = self.model.language_model(
            inputs_embeds=torch.from_numpy(embeds)[None],
            attention_mask=torch.ones(1, len(embeds), dtype=torch.int64),
            position_ids=torch.from_numpy(position_ids)[None],
            use_cache=False,
        )
        return output.logits[0].numpy()

    @quietly
    def generate(self, embeds: Float[np.ndarray, "S D"], max_new_tokens: int) -> Generated:
        """`language_model.generate(inputs_embeds=…)`, greedy; positions are left to it."""
        settings = transformers.GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(self.stop_token_ids) or None,
            pad_token_id=self.stop_token_ids[0] if self.stop_token_ids else 0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        output = self.model.language_model.generate(
            inputs_embeds=torch.from_numpy(embeds)[None],
            attention_mask=torch.ones(1, len(embeds), dtype=torch.int64),
            generation_config=settings,
        )
        logits = torch.stack([step[0] for step in output.logits]).float().numpy()
        return Generated(output.sequences[0].numpy(), logits)


class PrefixModel(nn.Module):
    """The three parts under the names that a distilvit2 checkpoint stores them by."""

    def __init__(
        self,
        vision: transformers.SiglipVisionConfig,
        text: transformers.LlamaConfig,
        config: Mapping[str, Any],
        *,
        lora: bool,
    ):
        super().__init__()
        # Eager attention is the plain formula; the fused kernels reorder its sums.
        vision._attn_implementation = text._attn_implementation = "eager"
        self.vision_encoder = transformers.SiglipVisionModel(vision)
        self.projection = Projection(config, vision.hidden_size, text.hidden_size)
        language: nn.Module = transformers.LlamaForCausalLM(text)
        self.language_model: Any = wrap_lora(language, config) if lora else language
        self.float()


class Projection(nn.Module):
    """[B,T,vision width] → [B,T,D]; one more level, for the name `projection.projection.*`."""

    projection: Any

    def __init__(self, config: Mapping[str, Any], width: int, hidden_size: int):
        super().__init__()
        kind = config.get("projection_type", "linear")
        if kind == "linear":
            self.projection = nn.Linear(width, hidden_size)
        elif kind == "mlp":
            inner = config.get("mlp_hidden_dim", 2048)
            self.projection = nn.Sequential(
                nn.Linear(width, inner), nn.GELU(), nn.Dropout(0.1), nn.Linear(inner, hidden_size)
            )
        else:
            raise ConfigError(
                f"config.json: projection_type {kind!r}", hint="known: 'linear', 'mlp'"
            )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.projection(features)


def wrap_lora(language: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    """PEFT's own wrapping, with the r, alpha and targets of config.json; nothing is merged."""
    settings = peft.LoraConfig(
        r=config.get("lora_r", 16),
        lora_alpha=config.get("lora_alpha", 16),
        lora_dropout=config.get("lora_dropout", 0.1),
        target_modules=list(config.get("lora_target_modules") or LORA_TARGETS),
        bias="none",
        task_type=peft.TaskType.CAUSAL_LM,
    )
    with warnings.catch_warnings():
        # peft 0.21 asks for an attribute that transformers 5.23 has renamed.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        return peft.get_peft_model(language, settings)  # type: ignore[arg-type]


def add_adapter(language: Any, folder: Path) -> nn.Module:
    """The language model under a PEFT folder too; a LoRA that is already there stays active.

    Raises AdapterError if the folder is no adapter, or one for other layers.
    """
    if not (folder / "adapter_config.json").is_file():
        raise AdapterError(
            f"{folder}: no adapter_config.json", hint="a folder that PEFT's save_pretrained wrote"
        )
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise AdapterError(f"{folder}: no {weights.name}", hint="pickles are not read")
    try:
        with warnings.catch_warnings():
            # Missing and surplus tensors, which PEFT only warns of, are found below.
            warnings.simplefilter("ignore")
            if isinstance(language, peft.PeftModel):
                language.load_adapter(str(folder), adapter_name=ADAPTER)
                language.base_model.set_adapter([*language.active_adapters, ADAPTER])  # type: ignore[operator]
            else:
                language = peft.PeftModel.from_pretrained(language, str(folder), ADAPTER)
            names = peft.get_peft_model_state_dict(
                language, adapter_name=ADAPTER, save_embedding_layers=False
            )
    except (ValueError, RuntimeError, KeyError) as error:
        raise AdapterError(f"{folder}: PEFT can't put it on this model: {error}") from error
    if wrong := load_file(weights).keys() ^ names.keys():
        raise AdapterError(
            f"{folder}: missing in it, or not in the language model: {some(wrong)}",
            hint="the reference takes adapters of the language model only",
        )
    return language


def load_strictly(
    model: nn.Module, state: Mapping[str, torch.Tensor], *, tied_head: bool, where: Path
) -> None:
    """Load every tensor, and leave none of the model unset; only a tied head may be missing.

    Raises WeightError with all missing, surplus and misshapen names.
    """
    own = model.state_dict()
    has_level = any(name.startswith(VISION + "vision_model.") for name in own)
    given = {_spell(name, has_level): tensor.float() for name, tensor in state.items()}
    if tied_head:
        heads = [name for name in own if name.endswith("lm_head.weight")]
        tables = [name for name in own if name.endswith("embed_tokens.weight")]
        for head, table in zip(heads, tables, strict=True):
            stored = given.setdefault(head, given[table]) if table in given else None
            if stored is not None and not torch.equal(stored, given[table]):
                raise WeightError(f"{where}: {head!r} differs from the embeddings it is tied to")
    missing, surplus = own.keys() - given.keys(), given.keys() - own.keys()
    misshapen = [
        f"{name} {list(given[name].shape)} (expected {list(own[name].shape)})"
        for name in own.keys() & given.keys()
        if own[name].shape != given[name].shape
    ]
    problems = [f"missing {some(missing)}"] if missing else []
    problems += [f"surplus {some(surplus)}"] if surplus else []
    problems += [f"misshapen {some(misshapen)}"] if misshapen else []
    if problems:
        raise WeightError(
            f"{where}: {len(missing) + len(surplus) + len(misshapen)} of {len(own)} weights do not "
            f"fit what config.json says: {'; '.join(problems)}",
            hint="config.json and the safetensors must come from one model",
        )
    model.load_state_dict(given)


def _spell(name: str, has_level: bool) -> str:
    """A stored name as this transformers spells it."""
    name = name.removeprefix("module.")
    if not name.startswith(VISION):
        return name
    rest = name.removeprefix(VISION).removeprefix("vision_model.")
    return VISION + ("vision_model." if has_level else "") + rest


def config_int(config: transformers.PreTrainedConfig, name: str) -> int:
    """A size that must be one whole number; some configs allow a pair."""
    value = getattr(config, name)
    if not isinstance(value, int):
        raise ConfigError(f"config.json: {name} is {value!r}, expected a whole number")
    return value


def _read_state(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of model.safetensors, or of the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    absent = [name for name in files if not (folder / name).is_file()]
    if absent:
        raise SourceError(f"{folder}: no {some(absent)}", hint="safetensors are read, no pickles")
    state: dict[str, torch.Tensor] = {}
    for name in files:
        state |= load_file(folder / name)
    return state


def _siglip_processor(folder: Path, size: int) -> Any:
    """SigLIP's processor on Pillow: the folder's own if it has one, else as distilvit2 calls it."""
    # Before transformers 5.3 or so, the plain name was the one on Pillow.
    kind = getattr(transformers, "SiglipImageProcessorPil", None)
    kind = kind or transformers.SiglipImageProcessor
    if (folder / "preprocessor_config.json").is_file():
        return kind.from_pretrained(str(folder))
    half = [0.5, 0.5, 0.5]
    return kind(
        size={"height": size, "width": size},
        resample=Image.Resampling.BICUBIC,
        image_mean=half,
        image_std=half,
    )


def useful_threads(weights: int) -> int:
    """As many threads as a model of this size can use, and as this process may."""
    # In a container they are fewer than the machine has.
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cpus, weights // WEIGHTS_A_THREAD))


REFERENCES: Mapping[str, Callable[..., Reference]] = {"prefix_conditioning_vlm": PrefixReference}
