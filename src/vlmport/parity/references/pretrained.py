"""Load a checkpoint as transformers itself reads it: model, processor and template.

Nothing of the checkpoint's files is read here but by `from_pretrained`: which file holds the
weights, old names of tensors, tied heads, types, defaults of settings and the choice of the chat
template are transformers' own.

Traps:
- The plain names of the image processors are those on torchvision, whose pixels differ.
- `generate` fills options that are not given from the model's generation_config.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers.utils import logging

from vlmport.errors import WeightError, some_problems
from vlmport.errors import some_names as some
from vlmport.text.chat_template import render_template
from vlmport.text.tokenizer import read_tokenizer

# transformers 5.3 or so gave the choice another name.
PILLOW: Mapping[str, Any] = (
    {"backend": "pil"} if hasattr(transformers, "Qwen2VLImageProcessorPil") else {"use_fast": False}
)
QUANTIZATION = ("quantization_config", "compression_config")
PLAIN = frozenset({"F64", "F32", "F16", "BF16", "I64", "BOOL"})
# Older versions stored what follows from the config. transformers passes over such tensors only
# where its model still has a buffer of that name.
BUFFERS = re.compile(
    r"(^|\.)(rotary(_pos)?_emb\.((original_)?inv_freq|(cos|sin)_cached)|position_ids)$"
)


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Silence warnings, log lines and progress bars: their subjects are checked here."""
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def load_model(folder: Path, ignored: Collection[str] = ()) -> Any:
    """Load the model in float32, every weight of it from the checkpoint.

    Args:
        ignored: tensors of the checkpoint that may have no place in the model.

    Raises WeightError with all missing, surplus and misshapen names.
    """
    with hushed():
        loaded: Any = transformers.AutoModelForImageTextToText.from_pretrained(
            str(folder),
            config=_config(folder),
            dtype=torch.float32,
            # The plain formula; the fused kernels reorder its sums.
            attn_implementation="eager",
            ignore_mismatched_sizes=True,  # they are errors below, all at once
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    model, found = loaded
    names = model.state_dict().keys()
    _check_loaded(names, found, ignored, folder)
    if getattr(model, "is_quantized", False) and not _dequantizes(model.config):
        with hushed():
            model = model.dequantize(dtype=torch.float32)  # by the library that quantized it
    return model.float().eval().requires_grad_(False)


def _config(folder: Path) -> Any:
    """Read the folder's config, without a quantization_config that is left over from another save:
    where no tensor is quantized, transformers would quantize the weights again."""
    config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    if not _is_quantized(folder):
        for section in (config, *(getattr(config, name, None) for name in config.sub_configs)):
            for key in QUANTIZATION:
                if hasattr(section, key):
                    delattr(section, key)
    elif _is_float8(config):
        config.quantization_config["dequantize"] = True  # its kernels are a GPU's
    return config


def _is_float8(config: Any) -> bool:
    """Return whether the weights are stored as float8."""
    settings = getattr(config, "quantization_config", None)
    return isinstance(settings, dict) and settings.get("quant_method") == "fp8"


def _dequantizes(config: Any) -> bool:
    """Return whether the weights became floats while they were loaded."""
    settings = getattr(config, "quantization_config", None)
    return bool(getattr(settings, "dequantize", False))


def _is_quantized(folder: Path) -> bool:
    """Return whether a stored tensor has a type that no plain weight has."""
    single = folder / "model.safetensors"
    for path in [single] if single.is_file() else sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if any(file.get_slice(name).get_dtype() not in PLAIN for name in file.keys()):  # noqa: SIM118
                return True
    return False


def _check_loaded(
    names: Collection[str], found: Mapping[str, Any], ignored: Collection[str], folder: Path
) -> None:
    misshapen = [
        f"{name} {list(stored)} (expected {list(expected)})"
        for name, stored, expected in found["mismatched_keys"]
    ]
    # transformers may have put another beginning before the file's name.
    ends = tuple(f".{name.partition('.')[2] or name}" for name in ignored)
    surplus = [
        name
        for name in found["unexpected_keys"]
        if not (name in ignored or name.endswith(ends) or BUFFERS.search(name))
    ]
    raise_unfit(found["missing_keys"], surplus, misshapen, len(names), folder)
    if found["error_msgs"]:
        raise WeightError(
            f"{folder}: transformers can't load it: {some_problems(found['error_msgs'])}",
            code="weights.unreadable",
        )


def raise_unfit(
    missing: Collection[str],
    surplus: Collection[str],
    misshapen: Collection[str],
    count: int,
    folder: Path,
) -> None:
    """Raise WeightError for a model of `count` weights if any weight does not fit."""
    problems = [f"{len(missing)} of {count} weights missing: {some(missing)}"] if missing else []
    problems += [f"{len(surplus)} surplus: {some(surplus)}"] if surplus else []
    problems += [f"{len(misshapen)} misshapen: {some(misshapen)}"] if misshapen else []
    if problems:
        code = "weights.misshapen" if misshapen else "weights.surplus"
        if missing:
            code = "weights.unset"
        raise WeightError(
            f"{folder}: {'; '.join(problems)}",
            hint="config.json and the safetensors must come from one model",
            code=code,
        )


def load_processor(folder: Path, kind: Any) -> Any:
    """Load the folder's processor by a class's own `from_pretrained`.

    Its image processor is the one on Pillow, and it has none for videos, which would need
    torchvision. A tokenizer that could end this process is refused before transformers reads it:
    TokenizerError.
    """
    if (folder / "tokenizer.json").is_file():
        read_tokenizer(folder)

    class OnPillow(kind):
        """The class, with an image processor on Pillow and none for videos."""

        @classmethod
        def _get_arguments_from_pretrained(cls, path: str, *_: Any, **options: Any) -> list[Any]:
            images = transformers.AutoImageProcessor.from_pretrained(path, **PILLOW, **options)
            parts = [images, transformers.AutoTokenizer.from_pretrained(path, **options)]
            return parts + [None] * (len(cls.get_attributes()) - len(parts))

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor" and argument is None:
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    OnPillow.__name__ = kind.__name__
    with hushed():
        return OnPillow.from_pretrained(str(folder), local_files_only=True)


def render(processor: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    """Render a prompt by the processor's template, or by its tokenizer's where it has none.

    It is rendered first where an endless template can be stopped, which transformers can't.
    Raises jinja2.TemplateError.
    """
    speaks = processor if processor.chat_template is not None else processor.tokenizer
    template = speaks.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if isinstance(template, str):
        tokens = processor.tokenizer.special_tokens_map
        render_template(template, messages=messages, **{**tokens, **options})
    return speaks.apply_chat_template(messages, tokenize=False, **options)


def stop_token_ids(model: Any) -> tuple[int, ...]:
    """Return the ids at which `generate` stops: the model's, else those of its decoder's config."""
    decoder = model.config.get_text_config()
    for settings in (model.generation_config, decoder):
        ids = getattr(settings, "eos_token_id", None)
        if ids is not None:
            return (ids,) if isinstance(ids, int) else tuple(ids)
    return ()


def forget_options(model: Any) -> None:
    """Reset the model's generation options, so that `generate` has only those that it is given."""
    model.generation_config = transformers.GenerationConfig()


def answer_stop_ids(model: Any, processor: Any) -> tuple[int, ...]:
    """Return `stop_token_ids`, the tokenizer's eos and the template's token after an answer."""
    others = (processor.tokenizer.eos_token_id, _end_of_turn(processor))
    known = (one for one in others if one is not None)
    return tuple(dict.fromkeys((*stop_token_ids(model), *known)))


def _end_of_turn(processor: Any) -> int | None:
    """Find the special token that the template writes after an assistant's message.

    None where the template writes none there, or refuses such a message.
    """
    said = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", "?"), ("assistant", "Ja"))
    ]
    try:
        _, *after = render(processor, said).split("Ja")
    except Exception:  # the requests find what is wrong with it
        return None
    kinds = processor.tokenizer.added_tokens_decoder
    text = after[-1].strip() if after else ""
    first = processor.tokenizer(text, add_special_tokens=False)["input_ids"][:1]
    return next((one for one in first if one in kinds and kinds[one].special), None)
