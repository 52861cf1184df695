"""Load a PEFT adapter by PEFT itself, under the names that it was trained with.

Adapters name modules as the model had them that was trained: the whole model, its base class, its
decoder alone, or the whole model in transformers up to 4.51, where the decoder was `model` and the
tower `visual`. PEFT finds targets, ranks and strengths by these names. So it is given the same
modules in a tree of these names, and nothing in the adapter is renamed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import nn

from vlmport.errors import AdapterError
from vlmport.errors import some_names as some

ADAPTER = "on_top"  # the name in PEFT of the adapter that is given separately
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
COPIES = ("embed_tokens.weight", "lm_head.weight")
PREFIX, MIDDLE = "base_model.model.", ".lora_"


@dataclass(frozen=True)
class Place:
    """A tree of the model's own modules, under the names of one way to train it."""

    root: nn.Module

    @classmethod
    def of(cls, **modules: nn.Module) -> Place:
        root = nn.Module()
        for name, module in modules.items():
            root.add_module(name, module)
        return cls(root)

    def lost(self, names: Sequence[str]) -> list[str]:
        """Return those of the names that are no modules here."""
        here = {name for name, _ in self.root.named_modules()}
        return [name for name in names if name not in here]


def places(model: Any) -> Iterator[Place]:
    """List the places at which an adapter of a tower and a decoder may have been trained.

    In the last two only the outer modules have other names; a head that gets an adapter there
    becomes the model's.
    """
    inner = model.model
    decoder = inner.language_model if hasattr(inner, "language_model") else inner.text_model
    yield from map(Place, (model, inner, decoder))
    yield Place.of(model=decoder, lm_head=model.lm_head)
    if hasattr(inner, "visual"):
        yield Place.of(visual=inner.visual, model=decoder, lm_head=model.lm_head)


def add_adapter(model: Any, folder: Path) -> None:
    """Add an adapter to a Hugging Face model, in place.

    Raises AdapterError where a tensor of the file finds no module, or a target finds no tensor.
    """
    load_adapter(folder, places(model), lambda root: _take_head(model, root))


def _take_head(model: Any, root: nn.Module) -> None:
    head = getattr(root, "lm_head", None)
    if head is not None:
        model.lm_head = head


def load_adapter(folder: Path, roots: Iterator[Place], loaded: Any = lambda root: None) -> None:
    """Load an adapter at the first place that has a module for each of its tensors, and a tensor
    for each of its targets. Other LoRA of these modules stays active.

    Args:
        loaded: called with the root, whose modules may be others now.
    """
    names = _trained_modules(folder)
    problems: list[tuple[int, str]] = []
    for place in roots:
        if lost := place.lost(names):
            what = f"{len(lost)} of {len(names)} modules are not in the model: {some(lost)}"
            problems.append((len(lost), what))
            continue
        unfit = _load(place.root, folder)
        if unfit is None:
            _activate(place.root)
            loaded(place.root)
            return
        problems.append((0, unfit))
    _, what = min(problems)
    raise AdapterError(
        f"{folder}: PEFT can't put it on this model: {what}",
        hint="give the checkpoint and the adapter that the bundle was exported from",
        code="adapter.not-of-this-model",
    )


def _load(root: nn.Module, folder: Path) -> str | None:
    """Load it by PEFT. Return None, or what does not fit; the adapter is then removed again."""
    config: Any = peft.PeftConfig.from_pretrained(str(folder))
    config.task_type = None  # it adds methods to the outermost module, and changes no numbers
    try:
        with warnings.catch_warnings():
            # PEFT warns about missing and surplus tensors, which are errors below.
            warnings.simplefilter("ignore")
            wrapped = peft.PeftModel(root, config, ADAPTER)  # type: ignore[arg-type]
            found = wrapped.load_adapter(str(folder), ADAPTER)
    except (ValueError, RuntimeError, KeyError) as error:
        return " ".join(str(error).split())[:300]
    # A copy of the base's embedding or head, which PEFT saves on its own and does not load.
    surplus = [name for name in found.unexpected_keys if not name.endswith(COPIES)]
    problems = [f"missing {some(found.missing_keys)}"] if found.missing_keys else []
    problems += [f"surplus {some(surplus)}"] if surplus else []
    if not problems:
        return None
    wrapped.base_model.delete_adapter(ADAPTER)  # type: ignore[operator]
    return "; ".join(problems)


def _activate(root: nn.Module) -> None:
    for module in root.modules():
        if isinstance(module, LoraLayer):
            module.set_adapter([*module.lora_A, *module.lora_embedding_A])  # type: ignore[arg-type]


def _trained_modules(folder: Path) -> list[str]:
    """List the modules that have LoRA tensors in the file. Raises AdapterError for no adapter."""
    if not (folder / CONFIG).is_file():
        raise AdapterError(
            f"{folder}: no {CONFIG}",
            hint="give a folder that PEFT's save_pretrained wrote",
            code="adapter.no-config",
        )
    if not (folder / WEIGHTS).is_file():
        raise AdapterError(
            f"{folder}: no {WEIGHTS}", hint="pickles are not read", code="adapter.no-weights"
        )
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        names = [name for name in file.keys() if MIDDLE in name]  # noqa: SIM118
    modules = {name.removeprefix(PREFIX).partition(MIDDLE)[0] for name in names}
    return sorted(modules)
