"""POST /caption: an image in a form, as the body itself, or in JSON, → its caption.

The options of the caption are in the query: /caption?num_beams=3&max_new_tokens=20.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.requests import Request

from vlmport.errors import ServerError, VlmportError, cut
from vlmport.runtime.images.uris import from_base64, is_address
from vlmport.runtime.response import Response
from vlmport.runtime.scheduling import Job
from vlmport.serve.api_errors import RequestError, body_of, of_validation
from vlmport.serve.chat_messages import check_image_size, read_image
from vlmport.serve.models import OpenModel
from vlmport.serve.schemas import Body, Finite
from vlmport.serve.service import Service, content_type, read_json
from vlmport.serve.waiting import responses, while_there

FORM = "multipart/form-data"
RAW = ("application/octet-stream", "binary/octet-stream", "")
BATCH = 8  # files of a form that wait in the queue together
MAX_FIELDS = 16
MAX_FIELD_BYTES = 65536


class CaptionOptions(Body):
    """Options of a caption, in the query."""

    model: str | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    min_new_tokens: Annotated[int, Field(ge=0)] | None = None
    num_beams: int | None = None
    length_penalty: Finite | None = None
    repetition_penalty: Finite | None = None
    no_repeat_ngram_size: int | None = None

    model_config = ConfigDict(extra="forbid", strict=False)  # a query holds texts


class CaptionRequest(Body):
    """An image in JSON: base64, a data: URL, or a URL of a host that the server allows."""

    image: str


@dataclass(frozen=True)
class _File:
    """An image of a form: its name there, and its bytes or what is wrong with it."""

    name: str
    image: bytes | VlmportError


async def caption(request: Request, service: Service) -> dict[str, Any]:
    """Caption the image of a request, or each of several files. Raises errors of ours."""
    options = _options(request)
    kind = content_type(request)
    if kind == FORM:
        files, fields = await _form(request, service)
        options = _merged(options, fields)
        name = options.model or service.models.default
        if len(files) != 1:
            return {"captions": await _several(files, name, options, request, service)}
        (file,) = files
        if isinstance(file.image, VlmportError):
            raise file.image
        image = file.image
    elif kind == "application/json":
        body = await read_json(request, CaptionRequest)
        image = await _named_image(body.image, service)
    elif kind.startswith("image/") or kind in RAW:
        image = await request.body()
        check_image_size(len(image), service.settings)
    else:
        raise RequestError(
            f"content type {kind[:60]!r}, expected an image, {FORM} or application/json",
            hint="curl -F image=@photo.jpg",
            code="server.wrong-content-type",
        )
    name = options.model or service.models.default
    request.state.logged = {"model": cut(name, 80)}
    async with while_there(request), service.models.lease(name) as model:
        job = request.state.job = await _submit(model, image, options)
    (found,) = await responses([job], request)
    if isinstance(found := _whole(job, found), VlmportError):
        raise found
    return {"caption": found.text.strip()}


def _whole(job: Job, found: Response | VlmportError) -> Response | VlmportError:
    """Return an error for a caption that the time limit cut: nothing in the answer could say so."""
    if isinstance(found, VlmportError) or job.reason != "time-limit":
        return found
    return ServerError(
        "the time limit passed before the caption was complete",
        hint="ask for fewer tokens, or start the server with a larger --time-limit",
        code="server.time-limit",
    )


def _options(request: Request) -> CaptionOptions:
    try:
        return CaptionOptions.model_validate(dict(request.query_params))
    except ValidationError as error:
        raise of_validation(error) from None


def _merged(options: CaptionOptions, fields: Mapping[str, str]) -> CaptionOptions:
    """Merge the query with the fields of a form, which count first."""
    try:
        return CaptionOptions.model_validate({**options.model_dump(exclude_none=True), **fields})
    except ValidationError as error:
        raise of_validation(error) from None


async def _named_image(text: str, service: Service) -> bytes:
    if is_address(text[:300].split(",")[0]) or text.lstrip()[:5].lower() == "data:":
        return await read_image(text, service.settings, service.fetcher)
    image = await asyncio.to_thread(from_base64, text)
    check_image_size(len(image), service.settings)
    return image


async def _form(request: Request, service: Service) -> tuple[list[_File], dict[str, str]]:
    """Read the files and the fields of a form."""
    settings = service.settings
    files: list[_File] = []
    fields: dict[str, str] = {}
    form = request.form(
        max_files=settings.max_images, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES
    )
    async with form as parts:
        for name, part in parts.multi_items():
            if isinstance(part, UploadFile):
                image = await part.read()
                try:
                    check_image_size(len(image), settings)
                    files.append(_File(part.filename or name, image))
                except RequestError as error:
                    files.append(_File(part.filename or name, error))
            else:
                fields[name] = part
    if not files:
        raise RequestError(
            "the form has no file",
            hint="curl -F image=@photo.jpg",
            code="server.wrong-value",
            param="image",
        )
    return files, fields


async def _submit(model: OpenModel, image: bytes, options: CaptionOptions) -> Job:
    given = options.model_dump(exclude_none=True, exclude={"model"})
    return await model.submit(model.caption_messages, [image], **given)


async def _several(
    files: Sequence[_File], name: str, options: CaptionOptions, request: Request, service: Service
) -> list[dict[str, Any]]:
    """Caption files, a few at a time; one that is bad has its error in place of a caption."""
    request.state.logged = {"model": cut(name, 80), "files": len(files)}
    done: list[dict[str, Any]] = []
    async with service.models.lease(name) as model:
        while len(done) < len(files):
            batch = files[len(done) : len(done) + BATCH]
            jobs = await _submitted(model, batch, options)
            found = iter(await responses([j for j in jobs if isinstance(j, Job)], request))
            for file, job in zip(batch, jobs, strict=False):  # the queue may have been full
                result = _whole(job, next(found)) if isinstance(job, Job) else job
                if isinstance(result, VlmportError):
                    done.append({"file": file.name, **body_of(result)})
                else:
                    done.append({"file": file.name, "caption": result.text.strip()})
    return done


async def _submitted(
    model: OpenModel, files: Sequence[_File], options: CaptionOptions
) -> list[Job | VlmportError]:
    """Submit files, as many of them as the queue takes; a bad file is its error.

    Raises ServerError where the queue takes none.
    """
    jobs: list[Job | VlmportError] = []
    try:
        for file in files:
            image = file.image
            is_bad = isinstance(image, VlmportError)
            jobs.append(image if is_bad else await _submit(model, image, options))
    except BaseException as error:
        is_full = isinstance(error, ServerError) and error.code == "server.queue-full"
        if is_full and jobs:
            return jobs
        for job in jobs:
            if isinstance(job, Job):
                job.cancel()
        raise
    return jobs
