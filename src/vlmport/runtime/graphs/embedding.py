"""Which token ids have an embedding."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlmport.bundle import Manifest
from vlmport.errors import PromptError, TokenizerError
from vlmport.files.onnx_bytes import table_rows
from vlmport.text.tokenizer import read_tokenizer

if TYPE_CHECKING:
    from jaxtyping import Int


def embedding_rows(manifest: Manifest, graph: Path) -> int:
    """How many ids a graph has embeddings for: the rows of its table, which the graph says.

    A graph that looks up something else than its input has as many as the manifest needs. There may
    be more or fewer than the head gives scores for.

    Raises BundleError for what is no ONNX file.
    """
    rows = table_rows(graph, "input_ids")
    if rows is not None:
        return rows
    return max(manifest.dims.vocab_size, manifest.prompt.image_token_id + 1)


def check_ids(ids: Int[np.ndarray, ...], rows: int, folder: Path) -> None:
    """Raise PromptError for an id that is negative or past the embedding's rows.

    Args:
        folder: the bundle's, whose tokenizer knows the token's text.
    """
    if not ids.size or (ids.min() >= 0 and ids.max() < rows):
        return
    wrong = ids[(ids < 0) | (ids >= rows)].reshape(-1)
    first = int(wrong[0])
    text = _text(first, folder)
    raise PromptError(
        f"token {first}{text} is past the embedding, which has {rows} rows; {len(wrong)} of "
        f"{ids.size} tokens are",
        hint="leave this token out; the tokenizer knows more tokens than the model",
        code="prompt.token-past-embedding",
    )


def _text(token: int, folder: Path) -> str:
    """A token's text in brackets, where the tokenizer knows it."""
    try:
        known = 0 <= token < 2**32  # the library takes no other
        text = read_tokenizer(folder).id_to_token(token) if known else None
    except TokenizerError:
        text = None
    return "" if text is None else f" ({text[:80]!r})"
