"""Turn messages into token ids: chat template, tokenizer, and the tokens of images.

A text that spells a placeholder must not become one. A template writes the placeholder of an image
as a literal of its own source. The same template with a mark instead of that literal writes the
mark where an image is, and every text as it is: no text, even after a filter or joined with others,
gives a mark. A copy of the tokenizer knows the mark instead of the placeholder, so that a text
which spells `<image>` is encoded as ordinary characters.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError
from tokenizers import Tokenizer

from vlmport.bundle import PromptSpec
from vlmport.errors import PromptError, TokenizerError, cut, did_you_mean, quoted, some_names
from vlmport.files.json_files import load_json
from vlmport.runtime.messages import Message, check_encodable, count
from vlmport.text.chat_template import TemplateLimitError, render_template, special_tokens
from vlmport.text.tokenizer import Encoder, read_tokenizer

if TYPE_CHECKING:
    from jaxtyping import Int64

KEYS = ("name", "tool_calls", "tool_call_id", "reasoning_content")  # that some templates read
AGAIN = "download or export the bundle again"
TOKENIZER = "tokenizer.json"


class Prompter:
    """A bundle's chat template and tokenizer.

    Raises TokenizerError for a tokenizer that is missing or unreadable.
    """

    def __init__(self, folder: Path, spec: PromptSpec):
        self.spec, self._folder = spec, folder
        self.tokenizer = read_tokenizer(folder, hint=AGAIN)
        self._renamed: tuple[dict[str, str], Encoder] | None = None
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self._encoder = Encoder(self.tokenizer)
        path = folder / "tokenizer_config.json"
        config = load_json(path, error=TokenizerError, hint=AGAIN) if path.is_file() else {}
        self._special = special_tokens(config)
        self._template = _template(folder, config)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Render the prompt as text, as `apply_chat_template` does.

        Raises PromptError where the template refuses the messages or is missing.
        """
        return self._render(messages, add_generation_prompt=add_generation_prompt)

    def _render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        mark: str | None = None,
    ) -> str:
        """Render the prompt, with `mark` for each placeholder that the template itself writes."""
        if self._template is None:
            raise PromptError(
                "this bundle has no chat template",
                hint="export the bundle again",
                code="template.missing",
            )
        placeholder = self.spec.image_placeholder

        def marked(text: str) -> str:
            return text if mark is None else text.replace(placeholder, mark)

        try:
            return render_template(
                self._template,
                marked,
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **{name: marked(text) for name, text in self._special.items()},
            )
        except TemplateLimitError as error:
            raise PromptError(
                f"the chat template was stopped: {error}",
                hint="check that the template is as published, and that the messages are short",
                code=error.code,
            ) from error
        except TemplateError as error:
            raise PromptError(
                f"the chat template refuses these messages: {cut(str(error))}",
                hint="use the roles and the content that this model expects; a captioner takes "
                "images only",
                code="template.refuses",
            ) from error

    def encode(self, text: str) -> Int64[np.ndarray, " S"]:
        """Tokenize a rendered prompt, without adding tokens. Raises PromptError."""
        return np.asarray(self._encoder.encode(text), np.int64)

    def ids(self, messages: Sequence[Message]) -> Int64[np.ndarray, " S"]:
        """Tokenize messages, with one placeholder for each image part and for nothing else.

        A text that spells the placeholder, or the token of an image's rows, is encoded as
        ordinary characters. All other texts get the ids that transformers gives them, also where
        they spell other special tokens.

        Raises PromptError as `render` does, and for a key of a message that the template does not
        read: it would have no effect.
        """
        self._check_keys(messages)
        text = self.render(messages)
        check_encodable(text, "the rendered prompt")
        ids = self.encode(text)
        mark = free_mark(text)
        marked = self._render(messages, mark=mark)
        count, spec = marked.count(mark), self.spec
        of_images = np.isin(ids, [spec.placeholder_token_id, spec.image_token_id])
        as_usual = marked.replace(mark, spec.image_placeholder) == text
        if as_usual and of_images.sum() == count:
            return ids
        parts = [part for one in messages for part in one["content"]]
        texts = "".join(part.get("text", "") for part in parts)
        missing = count != sum(part["type"] == "image" for part in parts)
        if missing and spec.image_placeholder not in texts:
            return ids  # a template that joins the placeholder from pieces
        return self._encode_marked(marked, mark)

    def _check_keys(self, messages: Sequence[Message]) -> None:
        words = {"role", "content", *re.findall(r"\w+", self._template or "")}
        for number, message in enumerate(messages):
            given = {str(name) for name, one in message.items() if not _is_empty(one)}
            if unread := given - words:
                known = {"role", "content", *KEYS} - unread
                near = did_you_mean(min(unread), sorted(known))
                raise PromptError(
                    f"messages[{number}]: {some_names(unread)}{near}: this model's chat template "
                    "does not read it",
                    hint="leave it out: it would have no effect",
                    code="prompt.unread-key",
                )

    def _encode_marked(self, text: str, mark: str) -> Int64[np.ndarray, " S"]:
        """Tokenize a rendered prompt in which only a mark is a placeholder."""
        spec, known = self.spec, self.tokenizer.id_to_token
        placeholder = known(spec.placeholder_token_id) or spec.image_placeholder
        row = known(spec.image_token_id) or placeholder
        # The token of an image's rows may be another one: it gets a name that no text contains.
        names = {row: free_mark(text), placeholder: mark}
        if self._renamed is None or self._renamed[0] != names:
            self._renamed = names, Encoder(renamed_tokenizer(self._folder, names))
        return np.asarray(self._renamed[1].encode(text), np.int64)

    def splice(
        self, ids: Int64[np.ndarray, " S"], images: Sequence[Int64[np.ndarray, " T"]]
    ) -> Int64[np.ndarray, " S+T"]:
        """Replace the n-th placeholder by the n-th image's ids.

        Raises PromptError unless there are as many placeholders as images.
        """
        at = np.flatnonzero(ids == self.spec.placeholder_token_id)
        if len(at) != len(images):
            raise PromptError(
                f"{count(len(images), 'image')} for "
                f"{count(len(at), 'placeholder')} {self.spec.image_placeholder!r} in the prompt",
                hint="this chat template writes it where no image part is"
                if len(at) > len(images)
                else "the template leaves out an image; put it into a user's message",
                code="prompt.placeholder-count",
            )
        parts, start = [], 0
        for position, image in zip(at, images, strict=True):
            parts += [ids[start:position], np.asarray(image, np.int64)]
            start = position + 1
        return np.concatenate([*parts, ids[start:]])


def _is_empty(value: Any) -> bool:
    """Whether a value is empty, as in tables of messages that have every key in every row."""
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Read tokenizer_config.json's template ('default' of several), or chat_template.jinja."""
    template = config.get("chat_template")
    path = folder / "chat_template.jinja"
    try:
        if isinstance(template, list):
            template = {one["name"]: one["template"] for one in template}.get("default")
        if template is None and path.is_file():
            template = path.read_text(encoding="utf-8")
        if not isinstance(template, str | None):
            raise TypeError(f"chat_template is {quoted(template, 80)}")
    except (KeyError, TypeError, ValueError) as error:
        raise TokenizerError(
            f"{folder}: no readable chat template: {cut(str(error))}",
            hint=AGAIN,
            code="template.unreadable",
        ) from error
    return template


def free_mark(text: str) -> str:
    """Return a mark that does not occur in a text: a number between private characters."""
    marks = (f"\ue0f0{number}\ue0f1" for number in itertools.count())
    return next(mark for mark in marks if mark not in text)


def renamed_tokenizer(folder: Path, names: Mapping[str, str]) -> Tokenizer:
    """Read the folder's tokenizer with other names for some added tokens and the same ids.

    Raises TokenizerError where the ids can't stay the same.
    """
    raw = json.loads((folder / TOKENIZER).read_text(encoding="utf-8"))
    ids = {}
    for token in raw.get("added_tokens") or ():
        if (name := names.get(token["content"])) is not None:
            ids[name] = token["id"]
            token.update(content=name, normalized=False)
    _rename_in_model(raw["model"], names)
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    moved = [name for name, id_ in ids.items() if tokenizer.token_to_id(name) != id_]
    if moved or ids.keys() != set(names.values()):
        raise TokenizerError(
            f"{folder / TOKENIZER}: a text spells {' or '.join(map(repr, names))}, which this "
            "tokenizer can't encode as ordinary characters",
            hint="remove it from the text",
            code="tokenizer.placeholder-in-text",
        )
    return tokenizer


def _rename_in_model(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Rename these tokens in the vocabulary too, so that merges can't produce them."""
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(token, token): id_ for token, id_ in vocab.items()}
    elif isinstance(vocab, list):
        model["vocab"] = [[names.get(token, token), score] for token, score in vocab]
    if "merges" in model:
        model["merges"] = [one for one in model["merges"] if not _makes(one, names)]


def _makes(merge: str | list[str], names: Mapping[str, str]) -> bool:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return not names.keys().isdisjoint((left, right, left + right))
