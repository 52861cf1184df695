"""Errors as OpenAI's API writes them, with the status of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from starlette.responses import JSONResponse

from vlmport.errors import (
    BundleError,
    DependencyError,
    DeviceError,
    SourceError,
    VlmportError,
    quoted,
)

# Code → status; other codes have that of their class.
STATUS: Mapping[str, int] = {
    "server.unauthorized": 401,
    "server.wrong-host": 403,
    "server.foreign-origin": 403,
    "server.unknown-model": 404,
    "server.no-such-path": 404,
    "server.wrong-method": 405,
    "server.body-too-slow": 408,
    "server.time-limit": 408,
    "server.body-too-large": 413,
    "server.wrong-content-type": 415,
    "server.queue-full": 429,
    "server.models-busy": 503,
    "server.draining": 503,
    "server.cancelled": 499,
    "program.defect": 500,
    "program.out-of-memory": 503,
    "dependency.missing": 501,
}
CLASSES: Mapping[type[VlmportError], int] = {
    BundleError: 500,
    DependencyError: 500,
    DeviceError: 500,
    SourceError: 500,
}
TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}

MANY = 100  # problems of one body that are looked at

# Values of the field `type`, by which pydantic names the alternatives.
TAGS = (
    "function", "image_url", "input_image", "input_text", "json_object", "json_schema",
    "output_text", "refusal", "text",
)  # fmt: skip


class RequestError(VlmportError):
    """An HTTP request is malformed, not allowed, or exceeds a limit of the server.

    Attributes:
        param: the field of the request that is wrong, as `messages[0].content`; None for others.
    """

    def __init__(
        self, message: str, *, code: str, hint: str | None = None, param: str | None = None
    ):
        super().__init__(message, hint=hint, code=code)
        self.param = param


class ErrorFields(BaseModel):
    """The fields of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorFields


def status_of(error: VlmportError) -> int:
    """The HTTP status of an error."""
    if error.code in STATUS:
        return STATUS[error.code]
    return next((status for kind, status in CLASSES.items() if isinstance(error, kind)), 400)


def type_of(status: int) -> str:
    """OpenAI's name for a kind of error."""
    return TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")


def body_of(error: VlmportError) -> dict[str, Any]:
    """The body of an error: the message and the hint as one text."""
    message = " ".join(str(error).splitlines())
    if error.hint:
        message = f"{message} (hint: {error.hint})"
    return {
        "error": {
            "message": message,
            "type": type_of(status_of(error)),
            "param": getattr(error, "param", None),
            "code": error.code,
        }
    }


def response_of(error: VlmportError) -> JSONResponse:
    """The response for an error, with the headers that its status asks for."""
    status = status_of(error)
    headers = {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    retry = getattr(error, "retry_after", None)
    if retry is not None or status in (429, 503):
        headers["Retry-After"] = str(max(1, round(retry or 1)))
    if error.code == "server.time-limit":  # openai's clients repeat a request after 408
        headers["X-Should-Retry"] = "false"
    if status in (408, 413):  # the rest of the body is not read
        headers["Connection"] = "close"
    return JSONResponse(body_of(error), status, headers)


def defect(error: Exception) -> VlmportError:
    """Make the error that a client sees for one that is not ours."""
    if isinstance(error, MemoryError):
        return VlmportError(
            "out of memory",
            hint="send smaller or fewer images, or try again later",
            code="program.out-of-memory",
        )
    return VlmportError(
        f"unexpected {type(error).__name__}",
        hint="this is a defect of vlmport: report it with the server's log",
        code="program.defect",
    )


def of_validation(error: ValidationError) -> RequestError:
    """Make one error of what pydantic found, with the place of the field.

    Of several problems an unknown field counts first: it is often the misspelled name of one that
    is missing. Then the deepest, because pydantic lists those of every alternative of a union; of
    equally deep ones that of the alternative which has the value's type.
    """
    if error.error_count() > MANY:  # describing each takes minutes
        return RequestError(
            f"the body has {error.error_count()} unknown fields and wrong values",
            hint="docs/serving.md describes the fields",
            code="server.wrong-value",
        )
    problems = error.errors(include_url=False, include_context=False)
    unknown = [one for one in problems if one["type"] == "extra_forbidden"]
    order = sorted(problems, key=lambda one: (-len(one["loc"]), one["type"].endswith("_type")))
    problem = (unknown or order)[0]
    param = path_of(problem["loc"])
    if problem["type"] == "json_invalid":
        return RequestError(
            f"the body is not JSON: {problem['msg']}",
            hint='Content-Type: application/json, and {"model": …}',
            code="server.not-json",
        )
    if problem["type"] == "extra_forbidden":
        return RequestError(
            f"unknown field {param}",
            hint="leave it out: it would have no effect; docs/serving.md lists the known ones",
            code="server.unknown-field",
            param=param,
        )
    if problem["type"] == "none_required":
        return RequestError(
            f"{param} is not supported",
            hint="leave it out; docs/serving.md lists the known fields",
            code="server.unknown-field",
            param=param,
        )
    given = "" if problem["type"] == "missing" else f", got {quoted(problem['input'], 60)}"
    return RequestError(
        f"{param or 'the body'}: {problem['msg']}{given}",
        hint="docs/serving.md describes the fields",
        code="server.wrong-value",
        param=param or None,
    )


def path_of(place: tuple[int | str, ...]) -> str:
    """Write the place of a field as `messages[0].content`.

    Names of alternatives, such as that of a class in a union, are pydantic's own and left out.
    """
    text = ""
    before: int | str = ""
    for part in place:
        if isinstance(part, int):
            text += f"[{part}]"
        elif not (_is_alternative(part) or (part in TAGS and _is_tagged(before))):
            text += f".{part}" if text else part
        before = part
    return text


def _is_alternative(name: str) -> bool:
    is_type = name in ("str", "int", "float", "bool") or name.startswith("constrained-")
    return is_type or not name[:1].islower() or "[" in name


def _is_tagged(before: int | str) -> bool:
    """Whether the next part of a place may be the value of a field `type`."""
    return isinstance(before, int) or before in ("response_format", "format", "tool_choice")
