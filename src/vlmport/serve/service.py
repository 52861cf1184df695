"""`Service`: what all routes of a server share."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from vlmport.serve.api_errors import RequestError, of_validation
from vlmport.serve.chat_messages import Fetcher
from vlmport.serve.metrics import Metrics
from vlmport.serve.models import Models
from vlmport.serve.settings import Settings

Body = TypeVar("Body", bound=BaseModel)
LARGE = 10_000  # bytes of a body that is parsed in a thread
MAX_OBJECTS = 20_000  # JSON objects and arrays in a body; more where long texts are allowed


@dataclass(frozen=True)
class Service:
    """What all routes of a server share."""

    settings: Settings
    models: Models
    fetcher: Fetcher
    metrics: Metrics


def new_id(kind: str) -> str:
    """Make an id that nobody guesses, such as 'chatcmpl-…'."""
    return f"{kind}-{secrets.token_hex(12)}"


async def read_json(request: Request, kind: type[Body]) -> Body:
    """Read the body of a request. Raises RequestError for one that is malformed.

    A web page of another origin can send other types without asking the server before.
    """
    check_json(request)
    raw = await request.body()
    longest = request.app.state.service.settings.max_characters
    if len(raw) > LARGE:
        return await asyncio.to_thread(_parsed, raw, kind, longest)
    return _parsed(raw, kind, longest)


def _parsed(raw: bytes, kind: type[Body], max_characters: int) -> Body:
    """Parse a body. Raises RequestError; an error may take as long as a valid body."""
    _check_structure(raw, max_characters)
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        raise of_validation(error) from None


def _check_structure(raw: bytes, max_characters: int) -> None:
    """Raise RequestError for a body of very many values.

    Parsing holds Python's lock, and takes memory for each value. Images have no comma and no
    brace; those in texts are counted as well, which is why long texts may have more.
    """
    objects, limit = raw.count(b"{") + raw.count(b"["), MAX_OBJECTS + max_characters // 20
    commas, most = raw.count(b","), MAX_OBJECTS + max_characters
    if objects > limit or commas > most:
        raise RequestError(
            f"the body has {objects} objects and arrays and {commas} commas, "
            f"this server takes at most {limit} and {most}",
            hint="send fewer messages, or start the server with a larger --max-characters",
            code="server.too-many-values",
        )


def content_type(request: Request) -> str:
    """The media type of the body, without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def check_json(request: Request) -> None:
    """Raise RequestError unless the body is said to be JSON."""
    kind = content_type(request)
    if kind != "application/json" and not (
        kind.startswith("application/") and kind.endswith("+json")
    ):
        raise RequestError(
            f"content type {kind[:60]!r}, expected application/json",
            hint="-H 'Content-Type: application/json'",
            code="server.wrong-content-type",
        )
