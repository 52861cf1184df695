"""Check messages in the chat format, and take their images out.

A part is a text or an image. An image is given in the spellings of Hugging Face (`image`, `url`,
`path`, `base64`) and of OpenAI (`image_url`), and may carry options of the image processor. No key
is dropped: an unknown key is an error.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from vlmport.errors import ImageError, PromptError, did_you_mean, quoted
from vlmport.runtime.images.uris import from_base64

ROLES = ("system", "user", "assistant", "tool")
SOURCES = ("image", "url", "path", "base64")
PARTS = ("text", "image", "image_url")
HINT_PARTS = '{"type": "text", "text": "…"} or {"type": "image"}'
HINT_VIDEO = "videos are not supported; give some frames as images"

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Chat:
    """Checked messages, every content a list of parts, and the images in them.

    Attributes:
        images: the images, in the order of the image parts.
        options: for each image, the image processor's options in its part.
    """

    messages: list[dict[str, Any]]
    images: list[Any]
    options: list[dict[str, Any]]


@dataclass(frozen=True)
class _Image:
    """An image part: its source, or None for the next of `images`."""

    source: Any
    options: dict[str, Any]


def check_messages(
    messages: Sequence[Message], images: Sequence[Any] = (), options: Collection[str] = ()
) -> Chat:
    """Check messages and gather their images, in the order of the messages.

    An image is a part `{"type": "image"}`, which takes the next of `images`, or a part that has its
    own: `{"type": "image", "image": …}`. The content may be a text instead of a list of parts.

    Args:
        options: names of the image processor's options, which an image part may carry.

    Raises PromptError for a bad role, part or key, and where the numbers of images and of parts
    differ; ImageError for base64 that can't be read.
    """
    if isinstance(messages, str | Mapping) or not messages:
        raise PromptError(
            f"messages must be a list of at least one message, got {_kind(messages)}",
            hint='[{"role": "user", "content": [{"type": "image"}]}]',
            code="prompt.wrong-value",
        )
    check_images(images)
    found: list[_Image] = []
    checked = []
    for number, message in enumerate(messages):
        parts = []
        for part in _parts(message, f"messages[{number}]", options):
            if isinstance(part, _Image):
                found.append(part)
            parts.append({"type": "image"} if isinstance(part, _Image) else part)
        checked.append({**message, "content": parts})
    waiting = sum(one.source is None for one in found)
    if waiting != len(images):
        raise PromptError(
            f"{count(len(images), 'image')} given, {count(waiting, 'image part')} without an image "
            "in the messages",
            hint='write one {"type": "image"} for each image',
            code="prompt.image-count",
        )
    rest = iter(images)
    filled = [next(rest) if one.source is None else one.source for one in found]
    return Chat(checked, filled, [one.options for one in found])


def check_images(images: Any) -> None:
    """Raise PromptError for one image instead of a list: the rows of an array are not images."""
    if not isinstance(images, list | tuple):
        raise PromptError(
            f"images must be a list, got {_one_image(images)}",
            hint="put it into a list: images=[…]",
            code="prompt.wrong-value",
        )


def _parts(message: Any, where: str, options: Collection[str]) -> list[dict[str, Any] | _Image]:
    """Return a message's content as a list of parts with known keys."""
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise PromptError(
            f"{where}: expected role and content, got {_kind(message)}",
            hint='{"role": "user", "content": "…"}',
            code="prompt.wrong-value",
        )
    if message["role"] not in ROLES:
        raise PromptError(
            f"{where}: role {quoted(message['role'])} is unknown"
            f"{did_you_mean(str(message['role']), ROLES)}",
            hint=f"one of {', '.join(ROLES)}",
            code="prompt.unknown-role",
        )
    content = message["content"]
    if content is None and message.get(
        "tool_calls"
    ):  # an assistant's message that only calls tools
        content = []
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, Sequence):
        raise PromptError(
            f"{where}: content is {_kind(content)}",
            hint="a text or a list of parts",
            code="prompt.wrong-value",
        )
    return [_part(part, f"{where}.content[{index}]", options) for index, part in enumerate(content)]


def _part(part: Any, where: str, options: Collection[str]) -> dict[str, Any] | _Image:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in PARTS or (kind == "text" and not isinstance(part.get("text"), str)):
        _refuse_part(part, kind, where)
    # Tables of messages have every key in every row, often as None.
    given = {name: value for name, value in part.items() if value is not None and name != "type"}
    if kind == "text":
        _check_names(given, ("text",), where)
        check_encodable(given["text"], where)
        return {"type": "text", "text": given["text"]}
    if kind == "image_url":
        _check_names(given, ("image_url",), where)
        return _Image(_address(given.get("image_url"), where), {})
    _check_names(given, (*SOURCES, *options), where)
    named = [name for name in SOURCES if name in given]
    if len(named) > 1:
        raise PromptError(
            f"{where}: {' and '.join(map(repr, named))}, expected one of them",
            hint="a part is one image",
            code="prompt.several-images",
        )
    if not named and "image" in part:
        raise PromptError(
            f"{where}: its image is None",
            hint="leave 'image' out or fill it",
            code="prompt.image-none",
        )
    source = _source(named[0], given[named[0]], where) if named else None
    return _Image(source, {name: given[name] for name in given if name not in SOURCES})


def _refuse_part(part: Any, kind: Any, where: str) -> NoReturn:
    is_video = kind in ("video", "video_url")
    near = did_you_mean(kind, PARTS) if isinstance(kind, str) and not is_video else ""
    raise PromptError(
        f"{where}: expected a text or an image part, got {_kind(part)}{near}",
        hint=HINT_VIDEO if is_video else HINT_PARTS,
        code="prompt.unknown-part",
    )


def _check_names(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for name in given:
        if name not in known:
            raise PromptError(
                f"{where}: unknown key {quoted(name)}{did_you_mean(str(name), known)}",
                hint=f"known here: type, {', '.join(known)}",
                code="prompt.unknown-key",
            )


def _source(name: str, value: Any, where: str) -> Any:
    """Read an image from one of the keys of SOURCES."""
    kinds = {"url": str, "path": (str, Path), "base64": (str, bytes)}
    if name in kinds and not isinstance(value, kinds[name]):
        raise PromptError(
            f"{where}: {name} is {_kind(value)}, expected a text",
            hint="use the key 'image' for Pillow images, arrays and open files",
            code="prompt.wrong-value",
        )
    if name != "base64" or (isinstance(value, str) and value.lstrip()[:5].lower() == "data:"):
        return value
    try:
        return from_base64(value)
    except ImageError as error:
        raise ImageError(f"{where}: {error}", hint=error.hint, code=error.code) from None


def _address(value: Any, where: str) -> str:
    """Return the address in OpenAI's `image_url`: a text, or an object with `url` and `detail`."""
    if isinstance(value, Mapping):
        _check_names(value, ("url", "detail"), f"{where}.image_url")
        if value.get("detail") not in (None, "auto"):
            raise PromptError(
                f"{where}: detail={quoted(value['detail'])} is not supported",
                hint="use image_options to set how an image is cut and scaled",
                code="prompt.wrong-value",
            )
        value = value.get("url")
    if not isinstance(value, str):
        raise PromptError(
            f"{where}: image_url without a url",
            hint='{"type": "image_url", "image_url": {"url": "data:image/png;base64,…"}}',
            code="prompt.wrong-value",
        )
    return value


def check_encodable(text: str, where: str) -> None:
    """Raise PromptError for surrogates, with which Python represents bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{where}: not Unicode at character {error.start}: {text[error.start]!a}",
            hint="use UTF-8",
            code="prompt.not-unicode",
        ) from None


def _one_image(value: Any) -> str:
    """Describe a path by its text, anything else by its type."""
    return _kind(value) if isinstance(value, str) else f"one {type(value).__name__}"


def _kind(value: Any) -> str:
    return quoted(value, 80)


def count(number: int, noun: str) -> str:
    """Format a number and its noun, in the plural unless the number is 1."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
