"""Tell the files of a folder apart: a checkpoint, an adapter, remains of training, other files.

Source: transformers 5.23 reads model.safetensors, else the shards of its index, and adds an adapter
that is in the same folder (`maybe_load_adapters`); peft 0.21 reads adapter_config.json and
adapter_model.safetensors. A weights file that neither reads may be a part of the trained model, so
none is ignored silently.
"""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from vlmport.errors import SourceError, some_names

__all__ = ["check_adapter", "check_checkpoint", "files_of", "unread_weights"]

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLED_ADAPTER = "adapter_model.bin"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npz", ".npy")
# Files that trainers write to resume training: transformers, accelerate, DeepSpeed.
TRAINING = (
    "optimizer*", "scheduler*", "scaler*", "training_args*", "rng_state*", "random_states_*",
    "sampler*", "dl_state_dict*", "trainer_state*", "*_optim_states.pt", "*_model_states.pt",
    "custom_checkpoint_*",
)  # fmt: skip
# The same weights for other programs, which many repositories have; transformers ignores them.
OTHER_FORMATS = (
    "pytorch_model*.bin", "consolidated*", "model.fp16.safetensors", "model.bf16.safetensors",
    "openvino*", "ggml*", "params.*",
)  # fmt: skip
PASSED_BY = ("checkpoint-*", "global_step*", "runs", "logs", "wandb", "onnx", "openvino*", ".*")


def files_of(folder: Path) -> list[str]:
    """List the files of a folder and of its subfolders, by their paths with slashes."""
    found = [path for pattern in ("*", "*/*") for path in folder.glob(pattern)]
    return sorted(path.relative_to(folder).as_posix() for path in found if path.is_file())


def check_checkpoint(folder: Path) -> None:
    """Raise SourceError unless the folder is a checkpoint, and only that."""
    if (folder / "vlmport.json").exists():
        raise SourceError(
            f"{folder}: it has vlmport.json: this is a bundle already",
            hint="run it directly; to export again, use the checkpoint that it was made from",
            code="source.is-bundle",
        )
    names = files_of(folder)
    adapter = [name for name in (ADAPTER, ADAPTER_WEIGHTS, PICKLED_ADAPTER) if name in names]
    whole = CONFIG in names and _has_weights(names)
    if whole and adapter:
        raise SourceError(
            f"{folder}: a model and an adapter in one folder: {some_names(adapter)}, and "
            "config.json and weights",
            hint="to merge the adapter, move these files into a folder of their own and use that "
            "with --adapter; if it is merged already, move them away",
            code="source.adapter-beside-model",
        )
    if whole or (CONFIG in names and not adapter and not _inner(names)):
        return  # if it has no weights, opening them reports that
    if adapter:
        raise SourceError(
            f"{folder}: it has {adapter[0]}: this is a LoRA adapter",
            hint=_base_and_adapter(folder, folder),
            code="source.is-adapter",
        )
    _refuse(folder, names)


def _refuse(folder: Path, names: Sequence[str]) -> None:
    """Raise SourceError, naming the subfolders that have a model or adapters."""
    here = "no weights" if CONFIG in names else "no config.json"
    adapters, models = _folders_with(ADAPTER, names), _folders_with(CONFIG, names)
    if adapters:
        last = folder / adapters[-1]
        raise SourceError(
            f"{folder}: {here} here, but LoRA adapters in {some_names(adapters)}",
            hint=_base_and_adapter(last, last),
            code="source.is-adapter",
        )
    if models:
        raise SourceError(
            f"{folder}: {here} here, but in {some_names(models)}",
            hint=f"use {folder / models[-1]}",
            code="source.in-subfolder",
        )
    raise SourceError(
        f"{folder}: no config.json; {_found(folder)}",
        hint="a checkpoint is a folder that save_pretrained() writes",
        code="source.no-config",
    )


def check_adapter(folder: Path, names: Sequence[str]) -> None:
    """Raise SourceError unless the folder is an adapter, and has no weights that would be ignored.

    Args:
        names: its files, as `files_of` lists them; for a repository all files, downloaded or not.
    """
    if ADAPTER not in names:
        _refuse_adapter(folder, names)
    if ADAPTER_WEIGHTS not in names and PICKLED_ADAPTER in names:
        raise SourceError(
            f"{folder}: only {PICKLED_ADAPTER} (pickled), expected {ADAPTER_WEIGHTS}",
            hint="convert it: load it on its base model with peft's PeftModel.from_pretrained(), "
            "then save_pretrained(folder)",
            code="adapter.pickled",
        )
    own = {ADAPTER_WEIGHTS, PICKLED_ADAPTER}
    others = [name for name in names if _is_weights(name, names) and name not in own]
    if not others:
        return
    what = f"weights next to the adapter, which peft does not read: {some_names(others)}"
    hint = (
        "if they belong to the trained model, load them and the adapter in PyTorch, then "
        "merge_and_unload() and save_pretrained(), and export that; if not, move them away"
    )
    if CONFIG in names and _has_weights(others):
        what = f"an adapter and a model in one folder: {some_names(others)}"
        hint = (
            f"move {ADAPTER} and {ADAPTER_WEIGHTS} into a folder of their own and use that with "
            "--adapter; if the adapter is merged into the model already, leave it out"
        )
    raise SourceError(f"{folder}: {what}", hint=hint, code="adapter.other-weights")


def _refuse_adapter(folder: Path, names: Sequence[str]) -> None:
    """Raise SourceError, naming the files that there are instead of an adapter."""
    if adapters := _folders_with(ADAPTER, names):
        last = folder / adapters[-1]
        raise SourceError(
            f"{folder}: no {ADAPTER} here, but in {some_names(adapters)}",
            hint=f"use {last}"
            if last.is_dir()  # subfolders of a Hub repository are not downloaded
            else f"download the repository, and use its folder {adapters[-1]}",
            code="adapter.in-subfolder",
        )
    hint = "an adapter is the folder that PEFT's save_pretrained() writes"
    if CONFIG in names and _has_weights(names):
        hint = f"this is a whole model: export it without --adapter; {hint}"
    raise SourceError(
        f"{folder}: no {ADAPTER}; {_found(folder)}", hint=hint, code="adapter.no-config"
    )


def unread_weights(folder: Path) -> list[str]:
    """List weights files of a checkpoint that transformers ignores, and that are unexpected."""
    names = [name for name in files_of(folder) if "/" not in name]
    read = {SINGLE} if SINGLE in names else _shards(folder / INDEX)
    return [
        name
        for name in names
        if name not in read and _is_weights(name, names) and not _matches(name, OTHER_FORMATS)
    ]


def _shards(index: Path) -> set[str]:
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return set()  # opening the index reports its fault


def _has_weights(names: Iterable[str]) -> bool:
    patterns = ("model*.safetensors*", "pytorch_model*.bin*")
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _is_weights(name: str, names: Iterable[str]) -> bool:
    """Return whether a file may hold this model's weights, and is no remains of training."""
    path = PurePosixPath(name)
    if path.suffix.lower() not in WEIGHTS or _matches(path.name, TRAINING):
        return False
    inner = path.parent.as_posix()
    if inner == ".":
        return True
    own = {f"{inner}/{CONFIG}", f"{inner}/{ADAPTER}"}
    return not _matches(inner, PASSED_BY) and own.isdisjoint(names)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _inner(names: Iterable[str]) -> bool:
    """Return whether a subfolder holds an adapter or a model, and the folder itself no weights."""
    root = [name for name in names if "/" not in name]
    return not any(PurePosixPath(name).suffix.lower() in WEIGHTS for name in root) and bool(
        _folders_with(ADAPTER, names) or _folders_with(CONFIG, names)
    )


def _folders_with(file: str, names: Iterable[str]) -> list[str]:
    """List the subfolders that hold this file, checkpoint-1000 after checkpoint-500."""
    found = [name.removesuffix(f"/{file}") for name in names if name.endswith(f"/{file}")]
    return sorted(found, key=lambda name: [int(n) for n in re.findall(r"\d+", name)] or [0])


def _base_and_adapter(folder: Path, adapter: Path) -> str:
    """Explain how to use an adapter with its base, which its config names."""
    try:
        raw = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
        base = raw.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    given = shlex.join(["--adapter", str(adapter)])
    if not isinstance(base, str) or not base:
        return f"use its base model, and {given}"
    return f"use its base model ({base[:200]!r} by its {ADAPTER}), and {given}"


def _found(folder: Path) -> str:
    names = [entry.name for entry in folder.iterdir()]
    return f"it has {some_names(names)}" if names else "it is empty"
