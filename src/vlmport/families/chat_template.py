"""The chat template of a checkpoint, from wherever its version of transformers wrote it, and the
token that it ends an answer with."""

from __future__ import annotations

from tokenizers import Tokenizer

from vlmport.chat_template import render_template, special_tokens
from vlmport.checkpoint import Checkpoint
from vlmport.errors import TokenizerError

JINJA, PROCESSOR = "chat_template.jinja", "chat_template.json"
TOKENIZER = "tokenizer_config.json"
ANSWER = "An answer."


def read_chat_template(checkpoint: Checkpoint) -> str:
    """The processor's template counts before the tokenizer's, as in transformers.

    Of several named ones it is 'default'. Raises TokenizerError where there is none.
    """
    path = checkpoint.folder / JINJA
    if path.is_file():
        return path.read_text(encoding="utf-8")
    for file in (PROCESSOR, "processor_config.json", TOKENIZER):
        template = (checkpoint.json(file) or {}).get("chat_template")
        if isinstance(template, list):
            named = {one.get("name"): one.get("template") for one in template}
            template = named.get("default")
        if isinstance(template, str):
            return template
    raise TokenizerError(
        f"{checkpoint.folder}: no chat template in {JINJA}, {PROCESSOR} or {TOKENIZER}",
        hint="a model that answers questions has one; is the download complete?",
    )


def token_after_answers(template: str, checkpoint: Checkpoint, tokenizer: Tokenizer) -> int | None:
    """The special token that the template writes right after an answer.

    None where it writes none there, or refuses a question and an answer of text alone.
    """
    talk = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", "A question?"), ("assistant", ANSWER))
    ]
    known = special_tokens(checkpoint.json(TOKENIZER) or {})
    nothing = {"tools": None, "documents": None, "add_generation_prompt": False}
    try:
        written = render_template(template, messages=talk, **nothing, **known)
        _, answer, after = written.rpartition(ANSWER)
        ids = tokenizer.encode(after.lstrip(), add_special_tokens=False).ids if answer else []
    except Exception:  # what is wrong with it is said when the export tries a prompt
        return None
    special = tokenizer.get_added_tokens_decoder()
    return ids[0] if ids and ids[0] in special and special[ids[0]].special else None
