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
LARGE = 100_000  # bytes of a body that is parsed in a thread


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
    try:
        if len(raw) > LARGE:
            return await asyncio.to_thread(kind.model_validate_json, raw)
        return kind.model_validate_json(raw)
    except ValidationError as error:
        raise of_validation(error) from None


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
