"""Turn the names of stored tensors into plain names.

A checkpoint saved from a wrapped model carries the wrappers in its names: DataParallel's
`module.`, torch.compile's `_orig_mod`, PEFT's `base_model.model.` and `.base_layer`. This module
removes them and separates the LoRA pairs. Any other tensor of PEFT changes the maths, and is
refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from vlmport.errors import AdapterError, WeightError, did_you_mean, some_names

__all__ = ["Names", "canonical_names", "is_buffer"]

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
SAVED_APART = ("modules_to_save", "original_module", "trainable_tokens", "token_adapter")
OTHER_TUNERS = (
    "ia3_", "vera_", "hada_", "lokr_", "oft_", "boft_", "hra_", "fourierft_", "vblora_",
    "randlora_", "bone_", "miss_", "shira_", "prompt_encoder", "adaption_",
)  # fmt: skip
# Tensors that older versions of transformers stored, although they follow from the config.
BUFFERS = re.compile(
    r"(^|\.)(rotary(_pos)?_emb\.((original_)?inv_freq|(cos|sin)_cached)|position_ids)$"
)
MERGE_FIRST = "merge it first: peft's merge_and_unload(), then save_pretrained()"


@dataclass
class Names:
    """The stored names of a checkpoint's tensors.

    Attributes:
        plain: plain name → stored name.
        pairs: plain name of the adapted weight → stored names of its lora_A and lora_B.
        adapter: the adapter's name, "" where the names carry none, None without pairs.
    """

    plain: dict[str, str] = field(default_factory=dict)
    pairs: dict[str, tuple[str, str]] = field(default_factory=dict)
    adapter: str | None = None


@dataclass
class _Sorting:
    """The names sorted so far, while making a `Names`."""

    plain: dict[str, list[str]] = field(default_factory=dict)
    halves: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    adapters: set[str] = field(default_factory=set)
    wrapped: dict[str, str] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)


def is_buffer(stored: str) -> bool:
    """Return whether a tensor of this name is computed from the config, and is no weight.

    Source: transformers 5.23, modeling_utils.py, _adjust_missing_and_unexpected_keys.
    """
    return BUFFERS.search(stored) is not None


def canonical_names(stored: Iterable[str], where: str, *, pairs_only: bool = False) -> Names:
    """Sort stored names into plain weights and LoRA pairs.

    Args:
        where: what to call the file in errors.
        pairs_only: the names are those of an adapter file, which holds no base weights.

    Raises:
        WeightError: two stored names have one plain name.
        AdapterError: several adapters, half a pair, a pair without its base weight, a weight that
            PEFT wrapped and that has no pair, or an artefact of PEFT other than LoRA pairs.
    """
    seen = _Sorting()
    for name in stored:
        _sort(name, seen)
    _refuse(seen, where)
    names = Names({name: files[0] for name, files in seen.plain.items()})
    modules = {module for module, _ in seen.halves}
    names.pairs = {
        f"{module}.weight": (seen.halves[module, "A"][0], seen.halves[module, "B"][0])
        for module in sorted(modules)
    }
    names.adapter = next(iter(seen.adapters), None)
    if not pairs_only:
        _check_bases(names, seen, where)
    return names


def _sort(stored: str, seen: _Sorting) -> None:
    """Put one stored name into its group."""
    parts = unwrap(stored)
    index = next((i for i, part in enumerate(parts) if part.startswith("lora_")), None)
    if any(part in SAVED_APART or part.startswith(OTHER_TUNERS) for part in parts):
        seen.refused.append(stored)
    elif index is not None:
        half, rest = parts[index], parts[index + 1 :]
        adapter = rest[0] if len(rest) == 2 else ""
        if half not in ("lora_A", "lora_B") or rest not in (["weight"], [adapter, "weight"]):
            seen.refused.append(stored)
            return
        module = ".".join(part for part in parts[:index] if part != "base_layer")
        seen.adapters.add(adapter)
        seen.halves.setdefault((module, half[-1]), []).append(stored)
    else:
        plain = ".".join(part for part in parts if part != "base_layer")
        if "base_layer" in parts:
            seen.wrapped[plain] = stored
        seen.plain.setdefault(plain, []).append(stored)


def unwrap(stored: str) -> list[str]:
    """Split a name into its parts, without wrappers and without `base_model.model`."""
    plain: list[str] = []
    for part in stored.split("."):
        # "module" is DataParallel's at the front only: elsewhere a model may use the name itself.
        if part in WRAPPERS or (part == "module" and not plain):
            continue
        if part == "model" and plain and plain[-1] == "base_model":
            plain.pop()
        else:
            plain.append(part)
    return plain


def _refuse(seen: _Sorting, where: str) -> None:
    """Raise for names that can't be read correctly in any checkpoint."""
    if seen.refused:
        what = f"{len(seen.refused)} tensors of PEFT that are not plain LoRA pairs"
        raise AdapterError(
            f"{where}: {what}: {some_names(seen.refused)}",
            hint=MERGE_FIRST,
            code="adapter.not-plain-lora",
        )
    if len(seen.adapters) > 1:
        what = f"{len(seen.adapters)} adapters: {some_names(seen.adapters)}"
        raise AdapterError(
            f"{where}: expected one adapter, got {what}",
            hint=MERGE_FIRST,
            code="adapter.not-plain-lora",
        )
    doubles = {n: files for n, files in seen.plain.items() if len(files) > 1}
    doubles |= {f"{m}.lora_{h}": files for (m, h), files in seen.halves.items() if len(files) > 1}
    if doubles:
        shown = "; ".join(
            f"{name!r} is {some_names(doubles[name])}" for name in sorted(doubles)[:4]
        )
        raise WeightError(
            f"{where}: {len(doubles)} names mean two tensors each: {shown}",
            hint="save the model again without its wrapper",
            code="weights.ambiguous",
        )
    halves = [
        f"{module}.lora_{half}"
        for module, half in seen.halves
        if (module, "B" if half == "A" else "A") not in seen.halves
    ]
    if halves:
        raise AdapterError(
            f"{where}: {len(halves)} LoRA tensors without their counterpart: {some_names(halves)}",
            hint="the file is incomplete; save the adapter again",
            code="adapter.incomplete",
        )


def _check_bases(names: Names, seen: _Sorting, where: str) -> None:
    """Check that every pair has a base weight, and every weight that PEFT wrapped has a pair."""
    orphans = sorted(name for name in names.pairs if name not in names.plain)
    if orphans:
        near = did_you_mean(orphans[0], names.plain)
        what = f"{len(orphans)} LoRA pairs without a base weight"
        raise AdapterError(
            f"{where}: {what}: {some_names(orphans)}{near}",
            hint="the file is incomplete; save the model again",
            code="adapter.incomplete",
        )
    modules = {name.rpartition(".")[0] for name in names.pairs}
    bare = [s for name, s in seen.wrapped.items() if name.rpartition(".")[0] not in modules]
    if bare:
        raise AdapterError(
            f"{where}: {len(bare)} weights that PEFT wrapped have no LoRA pair: {some_names(bare)}",
            hint="the adapter's tensors were dropped on saving; save the whole model again",
            code="adapter.incomplete",
        )
