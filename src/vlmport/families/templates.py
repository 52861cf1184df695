"""Read the chat template of a checkpoint, as any version of transformers wrote it, and find the
token that it writes after an answer.

Source of the order: transformers 5.23, processing_utils.py (`get_processor_dict`) and
tokenization_utils_base.py (`_from_pretrained`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from vlmport.checkpoint import Checkpoint
from vlmport.errors import TokenizerError, some_names
from vlmport.text.chat_template import render_template, special_tokens
from vlmport.text.tokenizer import encode

JINJA, LEGACY, PROCESSOR = "chat_template.jinja", "chat_template.json", "processor_config.json"
NAMED, TOKENIZER = "additional_chat_templates", "tokenizer_config.json"
KEY, DEFAULT = "chat_template", "default"
ANSWER = "An answer."


def read_chat_template(checkpoint: Checkpoint) -> str:
    """Read the template that transformers' AutoProcessor uses.

    The processor's own takes precedence over the tokenizer's: that of processor_config.json, then
    chat_template.json, then the Jinja files. Of several named ones it is 'default'.

    Raises TokenizerError if there is none, and if transformers refuses it.
    """
    if checkpoint.chat_template is not None:
        return checkpoint.chat_template
    where, template = _processors(checkpoint)
    if template is None:
        where, template = _tokenizers(checkpoint)
    if template is None:
        raise TokenizerError(
            f"{checkpoint.folder}: no chat template in {PROCESSOR}, {LEGACY}, {JINJA} or "
            f"{TOKENIZER}",
            hint="a model that answers questions has one; download the checkpoint again",
            code="template.missing",
        )
    if isinstance(template, dict):
        if DEFAULT not in template:
            raise TokenizerError(
                f"{where}: several chat templates ({some_names(template)}), none is {DEFAULT!r}",
                hint=f"name one of them {DEFAULT!r}; transformers needs it too",
                code="template.no-default",
            )
        template = template[DEFAULT]
    if not isinstance(template, str):
        raise TokenizerError(
            f"{where}: {KEY}: expected a text, got {type(template).__name__}",
            hint="transformers can't render it either; save the processor again",
            code="template.unreadable",
        )
    return template


def _processors(checkpoint: Checkpoint) -> tuple[str, Any]:
    """Return the file of the processor's template, and the template; None if there is none."""
    files = _files(checkpoint)
    legacy = checkpoint.json(LEGACY)
    if legacy is not None and files.keys() - {DEFAULT}:
        raise TokenizerError(
            f"{checkpoint.folder}: {LEGACY} together with the files of {NAMED}",
            hint=f"transformers refuses both together; write {JINJA} for {LEGACY}",
            code="template.conflict",
        )
    if legacy is not None and KEY not in legacy:
        raise TokenizerError(
            f"{checkpoint.folder / LEGACY}: no {KEY!r}",
            hint="transformers can't read it either; remove the file, or save the processor again",
            code="template.unreadable",
        )
    own = (checkpoint.json(PROCESSOR) or {}).get(KEY)
    if own is not None:
        return PROCESSOR, own
    if legacy is not None:
        return LEGACY, legacy[KEY] or None
    return (JINJA, files.get(DEFAULT) or None) if files.keys() <= {DEFAULT} else (NAMED, files)


def _tokenizers(checkpoint: Checkpoint) -> tuple[str, Any]:
    """Return the same for the tokenizer, whose Jinja files take precedence over its config."""
    if files := _files(checkpoint):
        return (JINJA, files[DEFAULT]) if files.keys() == {DEFAULT} else (NAMED, files)
    template = (checkpoint.json(TOKENIZER) or {}).get(KEY)
    if isinstance(template, list):
        named = [one for one in template if isinstance(one, dict)]
        template = {str(one.get("name")): one.get("template") for one in named}
    return TOKENIZER, template


def _files(checkpoint: Checkpoint) -> Mapping[str, str]:
    """Read the Jinja files, by their templates' names."""
    paths = {path.stem: path for path in sorted((checkpoint.folder / NAMED).glob("*.jinja"))}
    if (plain := checkpoint.folder / JINJA).is_file():
        paths[DEFAULT] = plain
    try:
        return {name: path.read_text(encoding="utf-8") for name, path in paths.items()}
    except (OSError, ValueError) as cause:
        raise TokenizerError(
            f"{checkpoint.folder}: a chat template that can't be read: {cause}",
            hint="save it as UTF-8",
            code="template.unreadable",
        ) from cause


def token_after_answers(template: str, checkpoint: Checkpoint, tokenizer: Tokenizer) -> int | None:
    """Find the special token that the template writes right after an answer.

    None if it writes none there, or refuses a question and an answer of text alone.
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
        ids = encode(tokenizer, after.lstrip()) if answer else []
    except Exception:  # the export reports its fault when it renders a prompt
        return None
    special = tokenizer.get_added_tokens_decoder()
    return ids[0] if ids and ids[0] in special and special[ids[0]].special else None
