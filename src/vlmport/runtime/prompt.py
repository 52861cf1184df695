"""Messages to token ids: the chat template, the tokenizer, and pictures spliced in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError
from tokenizers import Tokenizer

from vlmport.bundle import PromptSpec
from vlmport.chat_template import TemplateLimitError, render_template, special_tokens
from vlmport.errors import PromptError, TokenizerError, did_you_mean
from vlmport.json_files import load_json
from vlmport.runtime.placeholders import free_mark, renamed_tokenizer
from vlmport.tokenizer import read_tokenizer

if TYPE_CHECKING:
    from jaxtyping import Int64

ROLES = ("system", "user", "assistant", "tool")
AGAIN = "download or export the bundle again"

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Chat:
    """Checked messages, every content a list of parts, and the pictures that stand in them."""

    messages: list[dict[str, Any]]
    images: list[Any]


class Prompter:
    """A bundle's template and tokenizer.

    Raises TokenizerError for a tokenizer that is missing or unreadable.
    """

    def __init__(self, folder: Path, spec: PromptSpec):
        self.spec, self._folder = spec, folder
        self.tokenizer = read_tokenizer(folder, hint=AGAIN)
        self._renamed: tuple[dict[str, str], Tokenizer] | None = None
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        path = folder / "tokenizer_config.json"
        config = load_json(path, error=TokenizerError, hint=AGAIN) if path.is_file() else {}
        self._special = special_tokens(config)
        self._template = _template(folder, config)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The prompt as text, as `apply_chat_template` renders it.

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
        """The prompt as text, with `mark` for each placeholder that the template itself writes."""
        if self._template is None:
            raise PromptError("this bundle has no chat template", hint="export the bundle again")
        placeholder = self.spec.image_placeholder

        def marked(text: str) -> str:
            return text if mark is None else text.replace(placeholder, mark)

        try:
            return render_template(
                marked(self._template),
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **{name: marked(text) for name, text in self._special.items()},
            )
        except TemplateLimitError as error:
            raise PromptError(
                f"the chat template was stopped: {error}",
                hint="is it as its publisher wrote it? do the messages come to a long text?",
                code=error.code,
            ) from error
        except TemplateError as error:
            raise PromptError(
                f"the chat template refuses these messages: {error}",
                hint="roles and content must be as this model expects them",
                code="template.refuses",
            ) from error

    def encode(self, text: str) -> Int64[np.ndarray, " S"]:
        """Token ids of a rendered prompt: nothing is added to it."""
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    def ids(self, messages: Sequence[Message]) -> Int64[np.ndarray, " S"]:
        """Token ids of messages, a placeholder for each image part. No text becomes one.

        A text that spells the placeholder, or the token of an image's rows, is encoded as
        ordinary characters. All other texts have the ids that transformers gives them, other
        special tokens that they spell included.

        Raises PromptError as `render` does.
        """
        text = self.render(messages)
        ids = self.encode(text)
        mark = free_mark(text)
        marked = self._render(messages, mark=mark)
        count, spec = marked.count(mark), self.spec
        of_images = np.isin(ids, [spec.placeholder_token_id, spec.image_token_id])
        as_usual = marked.replace(mark, spec.image_placeholder) == text
        if as_usual and of_images.sum() == count:
            return ids
        parts = [part for one in messages for part in one["content"] if part["type"] == "image"]
        if count != len(parts):  # a template that builds the placeholder of pieces
            return ids
        return self._encode_marked(marked, mark)

    def _encode_marked(self, text: str, mark: str) -> Int64[np.ndarray, " S"]:
        """A rendered prompt's ids, where a mark is a placeholder and nothing else is."""
        spec, known = self.spec, self.tokenizer.id_to_token
        placeholder = known(spec.placeholder_token_id) or spec.image_placeholder
        row = known(spec.image_token_id) or placeholder
        # What a picture's rows have may be another token: it gets a name that no text holds.
        names = {row: free_mark(text), placeholder: mark}
        if self._renamed is None or self._renamed[0] != names:
            self._renamed = names, renamed_tokenizer(self._folder, names)
        encoded = self._renamed[1].encode(text, add_special_tokens=False)
        return np.asarray(encoded.ids, np.int64)

    def splice(
        self, ids: Int64[np.ndarray, " S"], images: Sequence[Int64[np.ndarray, " T"]]
    ) -> Int64[np.ndarray, " S+T"]:
        """Replace the n-th placeholder by the n-th picture's ids.

        Raises PromptError unless there are as many placeholders as pictures.
        """
        at = np.flatnonzero(ids == self.spec.placeholder_token_id)
        if len(at) != len(images):
            raise PromptError(
                f"{_count(len(images), 'picture')} for "
                f"{_count(len(at), 'placeholder')} {self.spec.image_placeholder!r} in the prompt",
                hint="this chat template writes it where no image part is"
                if len(at) > len(images)
                else "the template leaves out a picture; put it into a user's message",
                code="prompt.placeholder-count",
            )
        parts, start = [], 0
        for position, image in zip(at, images, strict=True):
            parts += [ids[start:position], np.asarray(image, np.int64)]
            start = position + 1
        return np.concatenate([*parts, ids[start:]])


def check_messages(messages: Sequence[Message], images: Sequence[Any] = ()) -> Chat:
    """Check messages and gather their pictures, in the order in which they stand.

    A picture is a part `{"type": "image"}`, filled from `images` in order, or one that carries
    its own: `{"type": "image", "image": …}`. A text may stand instead of a list of parts.

    Raises PromptError for a bad role or part, and for pictures without a place or the reverse.
    """
    if isinstance(messages, str | Mapping) or not messages:
        raise PromptError(
            f"messages must be a list of at least one message, got {_kind(messages)}",
            hint='[{"role": "user", "content": [{"type": "image"}]}]',
        )
    check_images(images)
    given, found, checked = list(images), [], []
    waiting = 0
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        parts = _parts(message, where)
        for part in parts:
            if part["type"] == "image":
                waiting += "image" not in part
                found.append(part.pop("image", None))
        checked.append({**message, "content": parts})
    if waiting != len(given):
        raise PromptError(
            f"{_count(len(given), 'picture')} given, {_count(waiting, 'image part')} without a "
            "picture in the messages",
            hint='each picture needs one {"type": "image"}',
        )
    rest = iter(given)
    return Chat(checked, [next(rest) if image is None else image for image in found])


def check_images(images: Any) -> None:
    """Raise PromptError for one picture in place of a list: its rows are no pictures."""
    if not isinstance(images, list | tuple):
        raise PromptError(
            f"images must be a list of pictures, got {_one_picture(images)}",
            hint="put it into a list: images=[…]",
        )


def _parts(message: Any, where: str) -> list[dict[str, Any]]:
    """A message's content as a list of parts that may be changed."""
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise PromptError(
            f"{where}: expected role and content, got {_kind(message)}",
            hint='{"role": "user", "content": "…"}',
        )
    if message["role"] not in ROLES:
        raise PromptError(
            f"{where}: role {message['role']!r} is unknown"
            f"{did_you_mean(str(message['role']), ROLES)}",
            hint=f"one of {', '.join(ROLES)}",
        )
    content = message["content"]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, Sequence):
        raise PromptError(f"{where}: content is {_kind(content)}", hint="a text or a list of parts")
    return [_part(part, f"{where}.content[{index}]") for index, part in enumerate(content)]


def _part(part: Any, where: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        _check_encodable(part["text"], where)
        return dict(part)
    if kind == "image":
        if part.get("image", ...) is None:
            raise PromptError(f"{where}: its image is None", hint="leave 'image' out or fill it")
        return dict(part)
    if kind == "image_url":
        raise PromptError(f"{where}: image_url is not fetched", hint='use {"type": "image"}')
    is_film = kind in ("video", "video_url")
    raise PromptError(
        f"{where}: expected a text or an image part, got {_kind(part)}",
        hint="videos are not read; give some frames as pictures"
        if is_film
        else '{"type": "text", "text": "…"} or {"type": "image"}',
    )


def _check_encodable(text: str, where: str) -> None:
    """Python keeps bytes that are no UTF-8 as surrogates, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{where}: not Unicode at character {error.start}: {text[error.start]!a}",
            hint="text is read as UTF-8",
        ) from None


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """tokenizer_config.json's template ('default' of several), else chat_template.jinja."""
    template = config.get("chat_template")
    path = folder / "chat_template.jinja"
    try:
        if isinstance(template, list):
            template = {one["name"]: one["template"] for one in template}.get("default")
        if template is None and path.is_file():
            template = path.read_text(encoding="utf-8")
        if not isinstance(template, str | None):
            raise TypeError(f"chat_template is {_kind(template)}")
    except (KeyError, TypeError, ValueError) as error:
        raise TokenizerError(f"{folder}: no readable chat template: {error}", hint=AGAIN) from error
    return template


def _one_picture(value: Any) -> str:
    """A path as it is written, anything else by its type: an array's pixels say nothing."""
    return _kind(value) if isinstance(value, str) else f"one {type(value).__name__}"


def _kind(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
