"""Merge a LoRA adapter in its own folder, as PEFT saves it, into a base checkpoint.

Source of the semantics: peft 0.21, tuners/lora/model.py (`_create_and_replace`) and
utils/other.py (`get_pattern_key`): the first pattern that matches the end of a module's name
gives its rank or its alpha. A setting that changes the maths in any other way is refused by name,
and so is an unknown one.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vlmport.checkpoint.config import Size, read_config
from vlmport.checkpoint.head import HeadNames, same_values
from vlmport.checkpoint.lora import LoraScale, Pair, merge_pairs
from vlmport.checkpoint.names import MERGE_FIRST, canonical_names
from vlmport.checkpoint.weights import LazyTensor, open_safetensors
from vlmport.errors import (
    AdapterError,
    CheckpointWarning,
    ConfigError,
    WeightError,
    did_you_mean,
    quoted,
    some_names,
    warn,
)
from vlmport.files.json_files import load_json
from vlmport.text.killable import RefusedError, StoppedError, Worker
from vlmport.text.services import patterns as patterns_service

__all__ = ["Adapter", "AdapterConfig", "merge_adapter"]

PATTERNS = Worker("pattern")
PLAIN_PATTERN = re.compile(r"(?:[\w.-]|\\[.d])*")  # nothing is repeated

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Initialisations that change the base weights too; without that change the adapter is wrong.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")
# peft stores them whole if LoRA is on one of them, or if they got more rows.
EMBEDDINGS = ("embed_tokens", "lm_head")
HARMLESS = frozenset(
    (
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "runtime_config", "lora_dropout", "init_lora_weights"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
        "fan_in_fan_out",  # for GPT-2's Conv1D: peft ignores it for the layers that we merge into
        *("megatron_core", "qalora_group_size"),  # without megatron_config and use_qalora: nothing
    )
)


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of adapter_config.json for merging; defaults are LoraConfig's."""

    must_be: ClassVar[Mapping[str, Sequence[Any]]] = {"peft_type": ("LORA",), "bias": ("none",)}

    peft_type: str
    r: Size = 8
    lora_alpha: float = 8.0
    use_rslora: bool = False
    rank_pattern: Mapping[str, Any] | None = None
    alpha_pattern: Mapping[str, Any] | None = None

    def scales(self, modules: Sequence[str], where: str) -> list[LoraScale]:
        """Return the scale of each module, given by its name in the model that was trained.

        Raises AdapterError for patterns that take too long.
        """
        ranks = _by_pattern(self.rank_pattern or {}, modules, self.r, where)
        alphas = _by_pattern(self.alpha_pattern or {}, modules, self.lora_alpha, where)
        return [
            LoraScale(r, float(alpha), self.use_rslora)
            for r, alpha in zip(ranks, alphas, strict=True)
        ]


@dataclass(frozen=True)
class Adapter:
    """A PEFT folder, opened.

    Attributes:
        pairs: name of the weight in the model that was trained → A [r, in], B [out, r].
        scales: the same names → rank and strength.
        whole: embedding and head, if the file holds them besides the pairs, by the same names.
        everywhere: target_modules is a list for all layers, so that a layer without a pair means
            that the file is incomplete.
    """

    folder: Path
    pairs: Mapping[str, Pair]
    scales: Mapping[str, LoraScale]
    whole: Mapping[str, LazyTensor] = dataclasses.field(default_factory=dict)
    everywhere: bool = False

    @classmethod
    def open(cls, folder: Path) -> Adapter:
        """Read a PEFT folder. Raises AdapterError naming what can't be merged."""
        raw = load_json(folder / CONFIG, error=AdapterError, hint="give the folder of an adapter")
        config = _read_settings(raw, folder / CONFIG)
        stored = _open_weights(folder)
        names = canonical_names(stored, str(folder / WEIGHTS), pairs_only=True)
        odd = [name for name in names.plain if not _is_embedding(name)]
        if odd:
            what = f"{len(odd)} tensors that are not LoRA: {some_names(odd)}"
            raise AdapterError(
                f"{folder / WEIGHTS}: {what}", hint=MERGE_FIRST, code="adapter.other-weights"
            )
        if not names.pairs:
            raise AdapterError(
                f"{folder / WEIGHTS}: no LoRA pairs",
                hint="save the adapter again",
                code="adapter.incomplete",
            )
        pairs = {name: (stored[a], stored[b]) for name, (a, b) in names.pairs.items()}
        modules = [name.removesuffix(".weight") for name in pairs]
        scales = dict(zip(pairs, config.scales(modules, str(folder / CONFIG)), strict=True))
        whole = {name: stored[file] for name, file in names.plain.items()}
        return cls(folder, pairs, scales, whole, _holds_everywhere(raw))


def merge_adapter(
    tensors: Mapping[str, LazyTensor],
    adapter: Adapter,
    prefixes: Sequence[str] = ("",),
    rename: Callable[[str], str] = str,
    head: HeadNames | None = None,
) -> dict[str, LazyTensor]:
    """Merge the adapter into `tensors`.

    A pair for the head leaves the embedding unchanged, even if both were one matrix: so does peft
    as long as the adapter is not merged there.

    Args:
        tensors: the base weights, by the names that `rename` gives.
        prefixes: prefixes that may precede the adapter's names, since it may have been trained on a
            part of the model: ("", "language_model."). One of them has to fit all pairs.
        head: the names of embedding and head.

    Raises AdapterError if no prefix fits, or several do, and for pairs of another shape. Warns
    with CheckpointWarning if an embedding or a head of the adapter replaces the base's.
    """
    names = _resolve(tensors, adapter, prefixes, rename)
    pairs = {names[name]: pair for name, pair in adapter.pairs.items()}
    scales = {names[name]: scale for name, scale in adapter.scales.items()}
    whole = {names[name]: tensor for name, tensor in adapter.whole.items()}
    tensors = _with_whole(tensors, whole, pairs, adapter.folder, head)
    if adapter.everywhere:
        _check_layers(tensors, pairs, adapter.folder)
    return merge_pairs(tensors, pairs, scales, str(adapter.folder))


def _resolve(
    tensors: Mapping[str, LazyTensor],
    adapter: Adapter,
    prefixes: Sequence[str],
    rename: Callable[[str], str],
) -> dict[str, str]:
    """Map name in the adapter → name in `tensors`."""
    targets = [*adapter.pairs, *(name for name in adapter.whole if name not in adapter.pairs)]
    trials = [{name: rename(prefix + name) for name in targets} for prefix in prefixes]
    fits = [trial for trial in trials if all(name in tensors for name in trial.values())]
    distinct = [trial for i, trial in enumerate(fits) if trial not in fits[:i]]
    if len(distinct) > 1:
        first = min(adapter.pairs)
        what = f"{first!r} may be {' or '.join(repr(trial[first]) for trial in distinct)}"
        raise AdapterError(
            f"{adapter.folder}: fits {len(distinct)} parts of the model: {what}",
            hint="train or save the adapter on the whole model, so that its names are complete",
            code="adapter.ambiguous",
        )
    if not distinct:
        # The prefix that fits most targets explains most.
        best = max(trials, key=lambda trial: sum(name in tensors for name in trial.values()))
        lost = sorted(name for name in best if best[name] not in tensors)
        near = did_you_mean(best[lost[0]], tensors)
        what = f"{len(lost)} of {len(best)} targets are not in the model: {some_names(lost)}{near}"
        raise AdapterError(
            f"{adapter.folder}: {what}",
            hint="use the base model that the adapter names",
            code="adapter.not-of-this-model",
        )
    names = distinct[0]
    if len(set(names.values())) < len(names):
        doubles = {name for name in names if list(names.values()).count(names[name]) > 1}
        raise AdapterError(
            f"{adapter.folder}: several pairs for one weight: {some_names(doubles)}",
            hint="save the adapter again",
            code="adapter.ambiguous",
        )
    return names


def _is_embedding(name: str) -> bool:
    """Return whether a plain name is that of an embedding's or a head's matrix."""
    module, _, leaf = name.rpartition(".")
    return leaf == "weight" and module.rpartition(".")[2] in EMBEDDINGS


def _with_whole(
    tensors: Mapping[str, LazyTensor],
    whole: Mapping[str, LazyTensor],
    pairs: Mapping[str, Pair],
    folder: Path,
    head: HeadNames | None,
) -> dict[str, LazyTensor]:
    """Replace the embedding and the head by those in the adapter's file.

    peft writes into the base's parameters, so that both change if they are one. It finds the matrix
    under LoRA only as `base_layer.weight`. Raises AdapterError for tensors that it would not load.
    """
    made = dict(tensors)
    # peft fills the head last.
    for name in sorted(whole, key=lambda name: head is not None and name == head.head):
        given, base = whole[name], made[name]
        if tuple(given.shape) != tuple(base.shape):
            raise AdapterError(
                f"{folder}: {given.name!r} is {list(given.shape)}, the base model's is "
                f"{list(base.shape)}",
                hint=f"resize the base as in training, model.resize_token_embeddings("
                f"{given.shape[0]}); then {MERGE_FIRST}",
                code="adapter.other-rows",
            )
        if same_values(given, base):
            continue
        if (name in pairs) != (".base_layer." in given.name):
            raise AdapterError(
                f"{folder}: {given.name!r} differs from the base model's, and peft does not load "
                "it under this name",
                hint=MERGE_FIRST,
                code="adapter.other-weights",
            )
        warn(
            CheckpointWarning(
                f"{folder}: {given.name!r} differs from the base model's: the adapter's is used, "
                "as in peft",
                code="adapter.embedding-replaced",
            )
        )
        both = () if head is None or not head.are_tied(made) else (head.embedding, head.head)
        made |= dict.fromkeys(both if name in both else (name,), given)
    return made


def _check_layers(
    tensors: Mapping[str, LazyTensor], pairs: Mapping[str, Pair], folder: Path
) -> None:
    """Raise AdapterError if a layer lacks a pair that the other layers have."""
    kinds = {_kind(name) for name in pairs}
    bare = [name for name in tensors if name not in pairs and _kind(name) in kinds]
    if bare:
        what = f"no LoRA pair for {len(bare)} weights that target_modules names"
        raise AdapterError(
            f"{folder}: {what}: {some_names(bare)}",
            hint="the adapter's file is incomplete, or of a model with fewer layers",
            code="adapter.incomplete",
        )


def _kind(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _holds_everywhere(raw: Mapping[str, Any]) -> bool:
    targets = raw.get("target_modules")
    if not isinstance(targets, list) or any(char.isdigit() for char in "".join(map(str, targets))):
        return False
    return raw.get("exclude_modules") is None and raw.get("layers_to_transform") is None


def _read_settings(raw: Mapping[str, Any], file: Path) -> AdapterConfig:
    """Read the settings. Raises AdapterError naming every setting that plain LoRA does not have."""
    try:
        config = read_config(AdapterConfig, raw, str(file))
    except ConfigError as cause:
        raise AdapterError(str(cause), hint=MERGE_FIRST, code="adapter.not-plain-lora") from cause
    known = HARMLESS | {field.name for field in dataclasses.fields(config)} | {"bias"}
    odd = [key for key, value in raw.items() if key not in known and value]
    init = raw.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(CHANGES_BASE):
        raise AdapterError(
            f"{file}: init_lora_weights={init!r} changed the base weights in training",
            hint="save it with path_initial_model_for_weight_conversion, or merge it with peft",
            code="adapter.not-plain-lora",
        )
    if init not in KEEPS_BASE:
        odd.append("init_lora_weights")
    if odd:
        shown = ", ".join(f"{key}={raw[key]!r}"[:80] for key in sorted(odd))
        raise AdapterError(
            f"{file}: not plain LoRA: {shown}", hint=MERGE_FIRST, code="adapter.not-plain-lora"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        _check_patterns(raw.get(key) or {}, key, file)
    return config


def _check_patterns(patterns: Mapping[str, Any], key: str, file: Path) -> None:
    """Check that every pattern compiles and gives a number (a rank of at least 1)."""
    for pattern, value in patterns.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if key == "rank_pattern":
            number = number and isinstance(value, int) and value >= 1
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as cause:
            problem = f"{quoted(pattern)} is not a regular expression: {quoted(str(cause))}"
        else:
            problem = f"{quoted(pattern)}: expected a number, got {quoted(value)}"
            if number:
                continue
        raise AdapterError(
            f"{file}: {key}: {problem}",
            hint="repair adapter_config.json",
            code="adapter.wrong-setting",
        )


def _by_pattern(
    patterns: Mapping[str, Any], modules: Sequence[str], default: Any, where: str
) -> list[Any]:
    """Find the value of the first pattern that matches each module's name from a dot to its end.

    Plain names of layers are matched here, which takes no time. Any other regular expression could
    run for ever, so it is matched in a process that can be stopped.
    """
    whole = [rf"(.*\.)?({pattern})$" for pattern in patterns]
    values = list(patterns.values())
    if all(PLAIN_PATTERN.fullmatch(pattern) for pattern in patterns):
        found = patterns_service()({"patterns": whole, "names": modules})
    else:
        try:
            found = PATTERNS.ask({"patterns": whole, "names": list(modules)})
        except (StoppedError, RefusedError) as error:
            raise AdapterError(
                f"{where}: matching {len(modules)} names by a pattern was stopped: {error}",
                hint="name the layers of rank_pattern and alpha_pattern in plain words",
                code="adapter.slow-pattern",
            ) from error
    return [default if number is None else values[number] for number in found]


def _open_weights(folder: Path) -> dict[str, LazyTensor]:
    file = folder / WEIGHTS
    if file.exists():
        try:
            return {**open_safetensors(file)}
        except AdapterError:
            raise
        except WeightError as cause:
            raise AdapterError(str(cause), hint=cause.hint, code=cause.code) from cause
    if (folder / "adapter_model.bin").exists():
        raise AdapterError(
            f"{folder}: only adapter_model.bin (pickled), expected {WEIGHTS}",
            hint="convert it: save_pretrained(folder, safe_serialization=True) in peft",
            code="adapter.pickled",
        )
    raise AdapterError(
        f"{folder}: expected {WEIGHTS}, found none",
        hint="copy or download the adapter again",
        code="adapter.no-weights",
    )
