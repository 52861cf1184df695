"""What the references share: reading a checkpoint, loading it strictly, adapters, generating.

Trap: a key that does not fit is an error. Loaded with `strict=False`, a checkpoint of another
spelling leaves the vision tower random and nobody is told.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import peft
import PIL
import torch
import transformers
from jinja2 import TemplateError
from safetensors.torch import load_file
from torch import nn

from vlmport.errors import AdapterError, ConfigError, PromptError, SourceError, WeightError
from vlmport.errors import some_names as some
from vlmport.verify.protocol import Generated
from vlmport.verify.requests import Request

if TYPE_CHECKING:
    from jaxtyping import Float

WEIGHTS_A_THREAD = 10_000_000  # for fewer, waking another thread costs more than it brings
ADAPTER = "on_top"  # what PEFT shall call the adapter that is given separately
DECODER_DIMS = (
    "hidden_size",
    "num_hidden_layers",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)

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


def versions() -> str:
    """The programs that the numbers come from."""
    return (
        f"transformers {transformers.__version__}, torch {torch.__version__}, "
        f"peft {peft.__version__}, Pillow {PIL.__version__}"
    )


def read_state(folder: Path) -> dict[str, torch.Tensor]:
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


def load_strictly(
    model: nn.Module, state: Mapping[str, torch.Tensor], *, tied_head: bool, where: Path
) -> None:
    """Load every tensor, and leave none of the model unset; only a tied head may be missing.

    Raises WeightError with all missing, surplus and misshapen names.
    """
    own = model.state_dict()
    given = {name: tensor.float() for name, tensor in state.items()}
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


def config_int(config: transformers.PreTrainedConfig, name: str) -> int:
    """A size that must be one whole number; some configs allow a pair."""
    value = getattr(config, name)
    if not isinstance(value, int):
        raise ConfigError(f"config.json: {name} is {value!r}, expected a whole number")
    return value


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


def prompt_text(processor: Any, request: Request) -> str:
    """The prompt by the checkpoint's own template. Raises PromptError where that refuses it."""
    messages = [dict(message) for message in request.messages]
    try:
        return processor.apply_chat_template(messages, add_generation_prompt=True)
    except TemplateError as error:
        raise PromptError(
            f"{request.name!r}: the chat template refuses what verify asks: {error}",
            hint="it asks with pictures and without, and a second time",
        ) from error


def generated(
    model: Any, embeds: Float[np.ndarray, "S D"], max_new_tokens: int, stops: Sequence[int]
) -> Generated:
    """Greedy tokens of `model.generate(inputs_embeds=…)`."""
    inputs = {
        "inputs_embeds": torch.from_numpy(embeds)[None],
        "attention_mask": torch.ones(1, len(embeds), dtype=torch.int64),
    }
    return generated_from(model, inputs, max_new_tokens, stops)


def generated_from(
    model: Any, inputs: Mapping[str, torch.Tensor], max_new_tokens: int, stops: Sequence[int]
) -> Generated:
    """Greedy tokens of `model.generate(**inputs)`, without those of the prompt."""
    settings = transformers.GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stops) or None,
        pad_token_id=stops[0] if stops else 0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    output = model.generate(**inputs, generation_config=settings)
    logits = torch.stack([step[0] for step in output.logits]).float().numpy()
    return Generated(output.sequences[0, -len(logits) :].numpy(), logits)


def useful_threads(weights: int) -> int:
    """As many threads as a model of this size can use, and as this process may."""
    # In a container they are fewer than the machine has.
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cpus, weights // WEIGHTS_A_THREAD))
