"""Read and strictly load the tensors of a checkpoint that no class of transformers reads.

The rules are those of transformers' `from_pretrained`: model.safetensors counts before an index,
tensors before the flag that ties them, and buffers that older versions stored are no weights.

Trap: a key that does not fit is an error. Loaded with `strict=False`, a checkpoint of another
spelling leaves the vision tower random without a word.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from vlmport.errors import SourceError
from vlmport.errors import some_names as some
from vlmport.parity.references.pretrained import BUFFERS, raise_unfit


def read_state(folder: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of model.safetensors, else of the shards that the index names."""
    files, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / files[0]).is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    absent = [name for name in files if not (folder / name).is_file()]
    if absent:
        raise SourceError(
            f"{folder}: no {some(absent)}",
            hint="vlmport reads safetensors, not pickles",
            code="weights.missing-file",
        )
    state: dict[str, torch.Tensor] = {}
    for name in files:
        state |= load_file(folder / name)
    return state


def head_differs(state: Mapping[str, torch.Tensor]) -> bool:
    """Return whether a head is stored that differs from the embedding."""
    heads = [tensor for name, tensor in state.items() if name.endswith("lm_head.weight")]
    tables = [tensor for name, tensor in state.items() if name.endswith("embed_tokens.weight")]
    return bool(heads and tables) and not torch.equal(heads[0], tables[0])


def load_strictly(
    model: nn.Module,
    state: Mapping[str, torch.Tensor],
    *,
    tied_head: bool,
    where: Path,
    ignored: Collection[str] = (),
) -> None:
    """Load every tensor, and leave none of the model unset; only one of a tied head and its
    embedding may be missing.

    Args:
        ignored: tensors that may have no place in the model.

    Raises WeightError with all missing, surplus and misshapen names.
    """
    own = model.state_dict()
    given = {
        name: tensor.float()
        for name, tensor in state.items()
        if not (BUFFERS.search(name) or name in ignored)
    }
    if tied_head:
        heads = [name for name in own if name.endswith("lm_head.weight")]
        tables = [name for name in own if name.endswith("embed_tokens.weight")]
        for head, table in zip(heads, tables, strict=True):
            one = given.get(table, given.get(head))
            given |= {} if one is None else {head: one, table: one}
    missing, surplus = own.keys() - given.keys(), given.keys() - own.keys()
    misshapen = [
        f"{name} {list(given[name].shape)} (expected {list(own[name].shape)})"
        for name in own.keys() & given.keys()
        if own[name].shape != given[name].shape
    ]
    raise_unfit(missing, surplus, misshapen, len(own), where)
    model.load_state_dict(given)
