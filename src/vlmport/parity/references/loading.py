"""Helpers of the references: threads, versions, sizes, prompts, generation."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import peft
import PIL
import torch
import transformers
from jinja2 import TemplateError

from vlmport.errors import ConfigError, PromptError
from vlmport.parity.asked import Request
from vlmport.parity.protocol import Generated
from vlmport.parity.references.pretrained import render

if TYPE_CHECKING:
    from jaxtyping import Float

WEIGHTS_A_THREAD = 10_000_000  # for fewer, waking another thread costs more than it brings
DECODER_DIMS = ("hidden_size", "num_hidden_layers", "num_key_value_heads", "vocab_size")

Method = TypeVar("Method", bound=Callable[..., Any])


def quietly(method: Method) -> Method:
    """Run a method without gradients, on the reference's own number of threads.

    Afterwards the number of threads is the caller's again.
    """

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
    """Name the programs that the numbers come from."""
    return (
        f"transformers {transformers.__version__}, torch {torch.__version__}, "
        f"peft {peft.__version__}, Pillow {PIL.__version__}"
    )


def config_int(config: transformers.PreTrainedConfig, name: str) -> int:
    """Read a size that must be one whole number; some configs allow a pair."""
    value = getattr(config, name)
    if not isinstance(value, int):
        raise ConfigError(
            f"config.json: {name} is {value!r}, expected a whole number", code="config.wrong-value"
        )
    return value


def decoder_dims(config: Any) -> dict[str, int]:
    """Read the decoder's sizes from its config, under the names of `vlmport.bundle.Dims`."""
    dims = {name: config_int(config, name) for name in DECODER_DIMS}
    if hasattr(config, "head_dim"):
        return dims | {"head_dim": config_int(config, "head_dim")}
    return dims | {"head_dim": config.hidden_size // config.num_attention_heads}


def prompt_text(processor: Any, request: Request) -> str:
    """Render a prompt with the checkpoint's own template. Raises PromptError where it refuses."""
    messages = [dict(message) for message in request.messages]
    try:
        return render(processor, messages, add_generation_prompt=True)
    except TemplateError as error:
        raise PromptError(
            f"{request.name!r}: the chat template refuses what verify asks: {error}",
            hint="verify asks with images and without, and asks a second time",
            code="template.refuses",
        ) from error


def generated(
    model: Any, embeds: Float[np.ndarray, "S D"], max_new_tokens: int, stops: Sequence[int]
) -> Generated:
    """Run `model.generate(inputs_embeds=…)` greedily."""
    inputs = {
        "inputs_embeds": torch.from_numpy(embeds)[None],
        "attention_mask": torch.ones(1, len(embeds), dtype=torch.int64),
    }
    return generated_from(model, inputs, max_new_tokens, stops)


def generated_from(
    model: Any, inputs: Mapping[str, torch.Tensor], max_new_tokens: int, stops: Sequence[int]
) -> Generated:
    """Run `model.generate(**inputs)` greedily; the prompt's tokens are left out."""
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
    """Return how many threads a model of this size can use, and this process may."""
    # A container may have fewer than the machine.
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cpus, weights // WEIGHTS_A_THREAD))
