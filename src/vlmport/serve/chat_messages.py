"""Translate OpenAI's messages into those of `VLM.generate`, and get their images."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from vlmport.errors import ImageError, cut
from vlmport.runtime.images.uris import bytes_of
from vlmport.serve import tools
from vlmport.serve.api_errors import RequestError
from vlmport.serve.schemas import ImagePart, Message, RefusalPart, TextPart
from vlmport.serve.settings import Settings

LOW_PIXELS = 512 * 512  # OpenAI's size for detail="low"
LONGEST_SHOWN = 80


class Fetcher(Protocol):
    """Returns the bytes of an image at an http(s) URL, as `RemoteImages` does."""

    async def fetch(self, url: str) -> bytes: ...


@dataclass
class Prompt:
    """Messages and images as `VLM.generate` takes them."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[bytes] = field(default_factory=list)


async def prompt_of(
    messages: Sequence[Message],
    offer: tools.Offer,
    *,
    other_characters: int = 0,
    image_options: Mapping[str, Any],
    settings: Settings,
    fetcher: Fetcher,
) -> Prompt:
    """Translate messages, and read the images in them.

    Args:
        other_characters: length of the request's other texts, such as a schema.
        image_options: the bundle's options of the image processor, with their defaults.

    Raises RequestError where a limit is exceeded, ImageError for an image that can't be had.
    """
    parts: list[ImagePart] = []
    translated = [_translated(message, image_options, parts) for message in messages]
    if offer:
        translated = _with_system(translated, tools.described(offer))
    check_limits(translated, len(parts), other_characters, settings)
    images = await read_images([part.image_url.url for part in parts], settings, fetcher)
    return Prompt(translated, images)


def _translated(
    message: Message, image_options: Mapping[str, Any], images: list[ImagePart]
) -> dict[str, Any]:
    """Translate one message, and add its images to `images`."""
    content: list[dict[str, Any]] = []
    given = message.content
    if isinstance(given, str):
        content.append({"type": "text", "text": given})
    for part in () if given is None or isinstance(given, str) else given:
        if isinstance(part, TextPart):
            content.append({"type": "text", "text": part.text})
        elif isinstance(part, RefusalPart):
            content.append({"type": "text", "text": part.refusal})
        else:
            images.append(part)
            options = detail_options(part.image_url.detail, image_options)
            content.append({"type": "image", **options})
    role = {"developer": "system", "tool": "user"}.get(message.role, message.role)
    if message.role == "tool":
        text = "".join(part.get("text", "") for part in content)
        content = [{"type": "text", "text": tools.tool_response(text)}]
    if message.tool_calls:
        content.append({"type": "text", "text": tools.written(message.tool_calls)})
    translated: dict[str, Any] = {"role": role, "content": content}
    if message.name is not None and message.role != "tool":
        translated["name"] = message.name
    return translated


def _with_system(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """Add a text to the system message, or a system message of this text."""
    part = {"type": "text", "text": text}
    if messages and messages[0]["role"] == "system":
        first = messages[0]
        gap = {"type": "text", "text": "\n\n"}
        return [{**first, "content": [*first["content"], gap, part]}, *messages[1:]]
    return [{"role": "system", "content": [part]}, *messages]


def detail_options(detail: str, image_options: Mapping[str, Any]) -> dict[str, Any]:
    """Translate `detail` into options of the image processor, as far as the bundle has any.

    `low` turns off what the processor can turn off (such as cutting an image into tiles), and
    limits an image to 512 × 512 pixels where its number of pixels has a maximum; `high` turns it
    on; `auto` leaves the bundle's defaults.
    """
    options: dict[str, Any] = {}
    if detail == "auto":
        return options
    for name, default in image_options.items():
        if isinstance(default, bool):
            options[name] = detail == "high"
        elif detail == "low" and name.startswith("max_") and name.endswith("_pixels"):
            least = image_options.get(name.replace("max_", "min_", 1), 1)
            options[name] = max(min(default, LOW_PIXELS), least)
    return options


def check_limits(
    messages: Sequence[Mapping[str, Any]], images: int, other_characters: int, settings: Settings
) -> None:
    """Raise RequestError for too many images or characters."""
    if images > settings.max_images:
        raise RequestError(
            f"{images} images, this server takes at most {settings.max_images} in a request",
            hint="send fewer, or start the server with a larger --max-images",
            code="server.too-many-images",
            param="messages",
        )
    length = other_characters
    length += sum(len(part.get("text", "")) for one in messages for part in one["content"])
    if length > settings.max_characters:
        raise RequestError(
            f"{length} characters of text, this server takes at most {settings.max_characters}",
            hint="shorten the messages, or start the server with a larger --max-characters",
            code="server.text-too-long",
            param="messages",
        )


async def read_images(urls: Sequence[str], settings: Settings, fetcher: Fetcher) -> list[bytes]:
    """Read images, all at the same time; the first that can't be read is an error.

    Raises ImageError or RequestError; the other images are not fetched any further then.
    """
    total = 0

    async def read(url: str) -> bytes:
        nonlocal total
        image = await read_image(url, settings, fetcher)
        total += len(image)
        if total > settings.max_body_bytes:  # those of URLs are not in the body
            raise RequestError(
                f"the images have more than {settings.max_body_bytes:,} bytes together",
                hint="send fewer or smaller images, or start the server with a larger "
                "--max-body-mb",
                code="server.body-too-large",
                param="messages",
            )
        return image

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(read(url)) for url in urls]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [one.result() for one in tasks]


async def read_image(url: str, settings: Settings, fetcher: Fetcher) -> bytes:
    """Return the bytes of an image. Raises ImageError."""
    scheme = url[:32].lstrip().partition(":")[0].lower()
    if scheme == "data":
        image = await asyncio.to_thread(bytes_of, url)
    elif scheme in ("http", "https"):
        image = await fetcher.fetch(url)
    else:
        raise ImageError(
            f"{cut(url, LONGEST_SHOWN)}: expected a data: or http(s) URL",
            hint="send the image itself: data:image/png;base64,…",
            code="image.url-invalid",
        )
    check_image_size(len(image), settings)
    return image


def check_image_size(size: int, settings: Settings) -> None:
    """Raise RequestError for an image file that is too large."""
    if size > settings.max_image_bytes:
        raise RequestError(
            f"an image of {size:,} bytes, this server takes at most {settings.max_image_bytes:,}",
            hint="scale the image down, or start the server with a larger --max-image-mb",
            code="server.image-too-large",
        )
