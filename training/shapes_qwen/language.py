"""The language model's start: that of shapes-smolvlm, which knows the questions already.

All layers have its sizes. What differs is learnt in the first stage for words: pictures by
rows and columns instead of one after another, other tokens around the turns, and in Qwen3 queries
and keys of a fixed length.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn

from training.shapes_qwen import prompts
from training.shapes_qwen.model import Chat
from training.shapes_smolvlm import prompts as smolvlm

TEXT_ON_DISK = "model.text_model."
SPACE = "Ġ"  # how a byte-level vocabulary writes it
STANDS_FOR = {
    prompts.END: smolvlm.END,
    prompts.IMAGE: smolvlm.IMAGE,
    prompts.VISION_START: smolvlm.FAKE,
    prompts.VISION_END: smolvlm.FAKE,
    "assistant": "Assistant",
    "user": "User",
}


def load_language(model: Chat, tokenizer: Tokenizer, folder: Path) -> None:
    """Take over the layers, and the rows of each token from the one most like it."""
    stored = load_file(folder / "model.safetensors")
    known = Tokenizer.from_file(str(folder / "tokenizer.json"))
    state = {
        name.removeprefix(TEXT_ON_DISK): value.float()
        for name, value in stored.items()
        if name.startswith(TEXT_ON_DISK)
    }
    rows = state.pop("embed_tokens.weight"), stored["lm_head.weight"].float()
    report = model.text.load_state_dict(state, strict=False)
    # Qwen2.5's biases begin at zero; `fit_lengths` gives Qwen3's norms their weights.
    new = [name for name in report.missing_keys if not name.endswith(("_norm.weight", ".bias"))]
    assert new == ["embed_tokens.weight"], new
    assert not report.unexpected_keys, report.unexpected_keys
    tables = model.text.embed_tokens.weight, model.vlm.lm_head.weight
    for token, row in tokenizer.get_vocab().items():
        like = _like(token, row, tokenizer, known)
        for table, source in zip(tables, rows, strict=True):
            table.data[row] = source[like].mean(dim=0)


def _like(token: str, row: int, tokenizer: Tokenizer, known: Tokenizer) -> list[int]:
    """The known ids that stand for a token: itself, itself after a space, or its parts."""
    for name in (STANDS_FOR.get(token, token), SPACE + token):
        number = known.token_to_id(name)
        if number is not None:
            return [number]
    text = tokenizer.decode([row], skip_special_tokens=False)
    return known.encode(text, add_special_tokens=False).ids


@torch.no_grad()
def fit_lengths(model: Chat, run: Callable[[], object]) -> None:
    """Weights of Qwen3's norms of queries and keys with which these keep the length they had.

    Args:
        run: one forward pass of the language model.
    """

    def keep(norm: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        norm.weight.fill_(inputs[0].float().pow(2).mean().sqrt())

    norms = [
        getattr(layer.self_attn, name)
        for layer in model.text.layers
        for name in ("q_norm", "k_norm")
        if hasattr(layer.self_attn, name)
    ]
    hooks = [norm.register_forward_pre_hook(keep) for norm in norms]
    run()
    for hook in hooks:
        hook.remove()
