"""The chat template of a checkpoint, from wherever its version of transformers wrote it."""

from __future__ import annotations

from vlmport.checkpoint import Checkpoint
from vlmport.errors import TokenizerError

JINJA, PROCESSOR = "chat_template.jinja", "chat_template.json"
TOKENIZER = "tokenizer_config.json"


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
