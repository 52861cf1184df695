"""A checkpoint that is open: its config.json, and its weights, which are read when needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from vlmport.checkpoint.adapter import Adapter, merge_adapter
from vlmport.checkpoint.folders import unread_weights
from vlmport.checkpoint.head import HeadNames
from vlmport.checkpoint.lora import LoraScale, merge_stored
from vlmport.checkpoint.quantized import without_quantization
from vlmport.checkpoint.source import locate
from vlmport.checkpoint.weights import LazyTensor, Weights
from vlmport.errors import CheckpointWarning, ConfigError, WeightError, some_names, warn
from vlmport.files.json_files import load_json

__all__ = ["Checkpoint", "merged"]


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json and safetensors, opened.

    Attributes:
        config: config.json without its quantization settings: the weights are floats when they are
            read.
        weights: by plain name; LoRA pairs stored inside are separate, in `weights.pairs`.
        files: name of a file → its path, if it is not in the folder; None if it must not be read.
        chat_template: takes precedence over the template of any file.
    """

    folder: Path
    config: dict[str, Any]
    weights: Weights
    files: Mapping[str, Path | None] = field(default_factory=dict)
    chat_template: str | None = None

    @classmethod
    def open(
        cls, source: str | Path, *, revision: str | None = None, known: Iterable[str] = ()
    ) -> Checkpoint:
        """Open a folder or a Hub id. Raises SourceError, ConfigError, WeightError.

        Args:
            known: other names that the caller takes, for an error that suggests one.
        """
        folder = locate(source, revision, known=known)
        config = load_json(folder / "config.json")
        weights = Weights.open(folder, config)
        _warn_of_unread(folder)
        return cls(folder, without_quantization(config), weights)

    @property
    def model_type(self) -> str:
        """The architecture's name in config.json. Raises ConfigError if there is none."""
        model_type = self.config.get("model_type")
        if not isinstance(model_type, str):
            raise ConfigError(
                f"{self.folder / 'config.json'}: model_type: expected a string, got {model_type!r}",
                hint="is it the config.json of a transformers model?",
                code="config.wrong-value",
            )
        return model_type

    def with_files(self, files: Mapping[str, Path | None], chat_template: str | None) -> Self:
        """Return the checkpoint with other files than config.json and the weights, see `files`."""
        return dataclasses.replace(self, files={**self.files, **files}, chat_template=chat_template)

    def path(self, name: str) -> Path | None:
        """Find a file other than config.json and the weights; None if there is none."""
        path = self.files.get(name, self.folder / name)
        return path if path is not None and path.exists() else None

    def json(self, name: str) -> dict[str, Any] | None:
        """Read a file such as generation_config.json; None if there is none."""
        path = self.path(name)
        return None if path is None else load_json(path)

    @property
    def tokenizer_folder(self) -> Path:
        """The folder of tokenizer.json."""
        path = self.path("tokenizer.json")
        return self.folder if path is None else path.parent


def _warn_of_unread(folder: Path) -> None:
    if unread := unread_weights(folder):
        warn(
            CheckpointWarning(
                f"{folder}: weights that neither transformers nor vlmport reads: "
                f"{some_names(unread)}",
                code="checkpoint.file-ignored",
            )
        )


def merged(
    weights: Weights,
    *,
    rename: Callable[[str], str] = str,
    lora: LoraScale | None = None,
    head: HeadNames | None = None,
    adapter: Path | None = None,
    prefixes: Sequence[str] = ("",),
) -> dict[str, LazyTensor]:
    """Map the family's name of every weight to it, with all LoRA merged in when it is read.

    Args:
        rename: the family's name for a plain name, without the prefixes that some versions of
            transformers add.
        lora: rank and strength of the pairs inside the checkpoint.
        head: where embedding and head are, by the family's names; without it neither is tied.
        adapter: the folder of a PEFT adapter to merge on top.
        prefixes: prefixes that may precede that adapter's names, see `merge_adapter`.

    Raises WeightError when two weights get one name, AdapterError when LoRA does not fit. Warns as
    `HeadNames.resolve` and `merge_adapter` do.
    """
    tensors = _renamed(merge_stored(weights, lora), rename, weights.where)
    if head is not None:
        tensors = head.resolve(tensors)
    if adapter is None:
        return tensors
    return merge_adapter(tensors, Adapter.open(adapter), prefixes, rename, head)


def _renamed(
    tensors: Mapping[str, LazyTensor], rename: Callable[[str], str], where: str
) -> dict[str, LazyTensor]:
    names: dict[str, list[str]] = {}
    for name in tensors:
        names.setdefault(rename(name), []).append(name)
    doubles = {new: old for new, old in names.items() if len(old) > 1}
    if doubles:
        shown = "; ".join(f"{new!r} is {some_names(doubles[new])}" for new in sorted(doubles)[:4])
        raise WeightError(
            f"{where}: {len(doubles)} names mean two weights each: {shown}",
            hint="the folder holds files of two saves of the model; save it again",
            code="weights.ambiguous",
        )
    return {new: tensors[old[0]] for new, old in names.items()}
