"""Check that every token of the tokenizer has a row of the embedding."""

from __future__ import annotations

from vlmport.checkpoint import Checkpoint
from vlmport.errors import CheckpointWarning, TokenizerError, some_names, warn
from vlmport.families.base import Family, HubFiles
from vlmport.text.tokenizer import read_tokenizer

CODE = "tokenizer.token-past-embedding"


def check_token_ids(checkpoint: Checkpoint, family: Family, hub: HubFiles) -> None:
    """Compare the tokenizer's ids with the rows of the checkpoint's embedding.

    Usually a tokenizer has fewer tokens than rows. Tokens beyond the rows were added without
    `resize_token_embeddings`. One that prompts need (a special token except the padding, a token of
    the chat template) is refused. Any other causes a warning, because only a text that holds it
    fails, as in transformers.

    Raises TokenizerError. Warns with CheckpointWarning.
    """
    tokenizer, rows = read_tokenizer(checkpoint.tokenizer_folder), family.dims.vocab_size
    past = {
        token: number
        for token, number in tokenizer.get_vocab(with_added_tokens=True).items()
        if number >= rows and token not in hub.new_tokens
    }
    if not past:
        return
    added, template = tokenizer.get_added_tokens_decoder(), hub.chat_template or ""
    padding = _padding(checkpoint)
    needed = [
        token
        for token, number in past.items()
        if token in template or (number in added and added[number].special and token not in padding)
    ]
    if needed:
        raise TokenizerError(
            f"{checkpoint.folder}: the embedding has {rows} rows, and {len(needed)} tokens that "
            f"prompts need are beyond them: {_listed(needed, past)}",
            hint="add rows for them to the model (resize_token_embeddings in transformers) and "
            "train these, or use the tokenizer that belongs to the weights",
            code=CODE,
        )
    warn(
        CheckpointWarning(
            f"the embedding has {rows} rows, and {len(past)} tokens of the tokenizer are beyond "
            f"them: {_listed(list(past), past)}; a text that holds one is refused",
            code=CODE,
        )
    )


def _listed(tokens: list[str], ids: dict[str, int]) -> str:
    return some_names([f"{token} = {ids[token]}" for token in tokens], 4, 80)


def _padding(checkpoint: Checkpoint) -> set[str]:
    """Read the padding tokens: they are masked, and no runtime looks them up."""
    found = set()
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        token = (checkpoint.json(file) or {}).get("pad_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found.add(token)
    return found
