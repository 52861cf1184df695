"""The reference of distilvit2: SigLIP, a projection and a Llama with LoRA, from transformers.

Traps:

* transformers 5 has no `vision_model` level in SiglipVisionModel; checkpoints may have it.
* distilvit2 adds no BOS and no prompt: token 0 comes from the logits of the last patch.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import peft
import torch
import transformers
from PIL import Image
from torch import nn

from vlmport.errors import ConfigError
from vlmport.parity.asked import Request
from vlmport.parity.configs import llama_config, stop_token_ids
from vlmport.parity.pictures import Picture
from vlmport.parity.protocol import HiddenStates
from vlmport.parity.reference_errors import in_one_line
from vlmport.parity.references.adapters import Place, load_adapter
from vlmport.parity.references.base import BaseReference
from vlmport.parity.references.loading import config_int, quietly
from vlmport.parity.references.tensors import head_differs, load_strictly, read_state

if TYPE_CHECKING:
    from jaxtyping import Float, Int

VISION, DECODER = "vision_encoder.", "language_model."
# Where the decoder was saved without its head.
BASE_CLASS = tuple(DECODER + part for part in ("embed_tokens.", "layers.", "norm."))
PREPROCESSOR, GENERATION = "preprocessor_config.json", "generation_config.json"
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")  # distilvit2's choice for llama


@in_one_line
class PrefixReference(BaseReference):
    """A distilvit2 checkpoint: SigLIP's patches, projected, are the prefix of a Llama with LoRA.

    Source: the modelling code of distilvit2 (`PrefixConditioningVLM`), in transformers' modules.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        image_token_id: int,
        adapter: str | Path | None = None,
        ignored: Collection[str] = (),
    ):
        # A whole SigLIP config holds both towers'.
        raw_vision = config["vision_config"].get("vision_config", config["vision_config"])
        vision = transformers.SiglipVisionConfig(**raw_vision)
        text = transformers.LlamaConfig(**llama_config(config["text_config"]))
        state = read_state(folder)
        lora = any(".lora_A." in name for name in state)
        # As in transformers 5: what is stored counts before the flag.
        text.tie_word_embeddings = text.tie_word_embeddings and not head_differs(state)
        model = PrefixModel(vision, text, config, lora=lora)
        load_strictly(
            model,
            _spelled(model, state),
            tied_head=bool(text.tie_word_embeddings),
            where=folder,
            ignored={_spell(name, _has_level(model)) for name in ignored},
        )
        if adapter is not None:
            load_adapter(Path(adapter), _places(model))
        size, patch = config_int(vision, "image_size"), config_int(vision, "patch_size")
        self.image_tokens = (size // patch) ** 2
        own = folder if adapter is None else Path(adapter)  # files saved with it count first
        self.processor = _siglip_processor(own if (own / PREPROCESSOR).is_file() else folder, size)
        generation = own if (own / GENERATION).is_file() else folder
        super().__init__(
            model,
            model.language_model,
            text_config=text,
            image_processor=self.processor,
            image_token_id=image_token_id,
            stop_token_ids=stop_token_ids(generation, text.eos_token_id),
        )

    def requests(self, pictures: Sequence[Picture]) -> list[Request]:
        """Ask for a caption of each image: this model takes one image and no text."""
        messages = ({"role": "user", "content": [{"type": "image"}]},)
        return [Request(one.name, (one,), messages, is_caption=True) for one in pictures]

    def prompt_ids(self, request: Request) -> Int[np.ndarray, " T"]:
        """Return the ids of the image, which is the whole prompt."""
        (image,) = request.images
        return self.image_ids(image)

    def image_ids(
        self, image: Image.Image, options: Mapping[str, Any] | None = None
    ) -> Int[np.ndarray, " T"]:
        """Return one id a patch; the image's own size does not matter."""
        return np.full(self.image_tokens, self.image_token_id, np.int64)

    def pixels(
        self, image: Image.Image, options: Mapping[str, Any] | None = None
    ) -> dict[str, np.ndarray]:
        """Make pixel_values float32 [1,3,size,size] in [-1,1], by SigLIP's processor on Pillow."""
        return {"pixel_values": self.processor(images=image, return_tensors="np")["pixel_values"]}

    @quietly
    def vision_features(self, inputs: Mapping[str, np.ndarray]) -> Float[np.ndarray, "T D"]:
        """Project the last hidden state, after post_layernorm, to the decoder's width."""
        hidden = torch.from_numpy(self.hidden_states(inputs).last)
        return self.model.projection(hidden).numpy()

    @quietly
    def hidden_states(self, inputs: Mapping[str, np.ndarray]) -> HiddenStates:
        """Run the tower up to post_layernorm, and the pooling head where the model has one."""
        pixels = torch.from_numpy(np.asarray(inputs["pixel_values"], np.float32))
        output = self.model.vision_encoder(pixel_values=pixels)
        pooled = output.pooler_output
        last = output.last_hidden_state[0].numpy()
        return HiddenStates(last, None if pooled is None else pooled[0].numpy())


class PrefixModel(nn.Module):
    """The three parts, under the names that they have in a distilvit2 checkpoint."""

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
                f"config.json: projection_type {kind!r}",
                hint="known: 'linear', 'mlp'",
                code="config.unsupported-value",
            )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.projection(features)


def wrap_lora(language: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    """Wrap the decoder by PEFT with the r, alpha and targets of config.json; nothing is merged."""
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


def _places(model: PrefixModel) -> Iterator[Place]:
    """List the places at which an adapter may have been trained: the decoder, or the whole model,
    whose tower had one more level in transformers 4."""
    language = model.language_model
    inside = language.get_base_model() if isinstance(language, peft.PeftModel) else language
    yield Place(inside)
    parts = {"projection": model.projection, "language_model": inside}
    yield Place.of(vision_encoder=model.vision_encoder, **parts)
    yield Place.of(vision_encoder=Place.of(vision_model=model.vision_encoder).root, **parts)


def _spelled(model: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the stored tensors as the installed transformers names them."""
    level = _has_level(model)
    return {_spell(name, level): tensor for name, tensor in state.items()}


def _has_level(model: nn.Module) -> bool:
    """Return whether the tower of the installed transformers has a `vision_model`."""
    return any(name.startswith(VISION + "vision_model.") for name in model.state_dict())


def _spell(name: str, level: bool) -> str:
    """Spell a stored name as the installed transformers does."""
    name = name.removeprefix("module.")
    if name.startswith(BASE_CLASS):
        return name.replace(DECODER, f"{DECODER}model.", 1)
    if not name.startswith(VISION):
        return name
    rest = name.removeprefix(VISION).removeprefix("vision_model.")
    return VISION + ("vision_model." if level else "") + rest


def _siglip_processor(folder: Path, size: int) -> Any:
    """Load SigLIP's processor on Pillow: the folder's own, else as distilvit2 calls it."""
    # Before transformers 5.3 or so, the plain name was the one on Pillow.
    kind = getattr(transformers, "SiglipImageProcessorPil", None)
    kind = kind or transformers.SiglipImageProcessor
    if (folder / PREPROCESSOR).is_file():
        return kind.from_pretrained(str(folder))
    half = [0.5, 0.5, 0.5]
    return kind(
        size={"height": size, "width": size},
        resample=Image.Resampling.BICUBIC,
        image_mean=half,
        image_std=half,
    )


REFERENCE = PrefixReference
