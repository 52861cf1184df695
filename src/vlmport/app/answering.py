"""Answer for the page: by a model in this process, or by a server with OpenAI's API."""

from __future__ import annotations

import base64
import contextlib
import json
import mimetypes
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, urlencode

import httpx

from vlmport.errors import PromptError, ServerError, cut, quoted, some_names
from vlmport.runtime.messages import Message, check_messages
from vlmport.runtime.model import VLM
from vlmport.runtime.scheduling import Piece, Scheduler

__all__ = ["Answering", "LocalAnswering", "RemoteAnswering"]

CONNECT_SECONDS, SILENT_SECONDS = 10.0, 300.0
LONGEST_LINE = 10_000_000  # characters of one event of a stream


class Answering(Protocol):
    """What the page asks.

    Attributes:
        name: the model.
        takes_questions: whether it answers questions, and not only captions.
    """

    name: str
    takes_questions: bool

    def facts(self) -> tuple[str, ...]:
        """What is known of the model, such as its precision and device. Raises VlmportError."""
        ...

    def caption(self, image: str, *, max_new_tokens: int) -> Iterator[str]:
        """Caption the image at a path; yield the text piece by piece. Raises VlmportError."""
        ...

    def answer(
        self, messages: Sequence[Message], images: Sequence[str], **options: Any
    ) -> Iterator[str]:
        """Answer messages as `VLM.generate` takes them, piece by piece. Raises VlmportError."""
        ...


class LocalAnswering:
    """A model in this process. Visitors' requests run together."""

    def __init__(self, name: str, model: VLM):
        self.name = name
        self._model, self._scheduler = model, Scheduler(model)
        self.takes_questions = self._renders_a_question()

    def facts(self) -> tuple[str, ...]:
        """Precision and device."""
        model = self._model
        return f"precision {model.precision}", f"device {model.device}", "in this process"

    def caption(self, image: str, *, max_new_tokens: int) -> Iterator[str]:
        """Caption an image."""
        messages = self._model.components.manifest.prompt.caption
        return self.answer(messages, [image], max_new_tokens=max_new_tokens)

    def answer(
        self, messages: Sequence[Message], images: Sequence[str], **options: Any
    ) -> Iterator[str]:
        """Answer messages."""
        job = self._scheduler.submit(messages, images, **options)
        try:
            for event in job.events():
                if isinstance(event, Piece):
                    yield event.text
            job.result()  # raises where the request failed
        finally:
            job.cancel()  # the visitor may have gone

    def close(self) -> None:
        """End the requests."""
        self._scheduler.close()

    def _renders_a_question(self) -> bool:
        """Whether the chat template takes text; a captioner's refuses it."""
        parts = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
        chat = check_messages([{"role": "user", "content": parts}], [b"none is read here"])
        try:
            self._model.preparer.text_ids(chat.messages)
        except PromptError:
            return False
        return True


class RemoteAnswering:
    """A model on a server with OpenAI's API, such as `vlmport serve`.

    Args:
        url: where the server listens, with or without /v1.
        model: a model of the server; its first without one.
        api_key: the key that the server asks for.

    Raises:
        ServerError: the server can't be reached, refuses, or has no such model.
    """

    takes_questions = True

    def __init__(self, url: str, model: str | None = None, api_key: str | None = None):
        base = url.rstrip("/").removesuffix("/v1")
        try:
            self._client = httpx.Client(
                base_url=base,
                headers={} if api_key is None else {"authorization": f"Bearer {api_key}"},
                timeout=httpx.Timeout(SILENT_SECONDS, connect=CONNECT_SECONDS),
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise _unreachable(url, str(error)) from None
        self._url = url
        served = [str(one.get("id")) for one in self._json("GET", "/v1/models").get("data", ())]
        if model is not None and model not in served:
            raise ServerError(
                f"{cut(url)}: no model {quoted(model)}",
                hint=f"it serves {some_names(served)}",
                code="server.unknown-model",
            )
        if not served:
            raise _unreachable(url, "it serves no model")
        self.name = model or served[0]

    def facts(self) -> tuple[str, ...]:
        """Precision and device, once the server has opened the model."""
        own = self._json("GET", f"/v1/models/{quote(self.name)}").get("vlmport")
        known = own.items() if isinstance(own, Mapping) else ()
        facts = [f"{name} {value}" for name, value in known if name in ("precision", "device")]
        return (*facts, f"served by {self._client.base_url}".rstrip("/"))

    def caption(self, image: str, *, max_new_tokens: int) -> Iterator[str]:
        """Caption an image, with the prompt that the server has for it; in one piece."""
        options = {"model": self.name, "max_new_tokens": max_new_tokens}
        path = f"/caption?{urlencode(options)}"
        yield str(self._json("POST", path, {"image": _data_url(image)}).get("caption", ""))

    def answer(
        self, messages: Sequence[Message], images: Sequence[str], **options: Any
    ) -> Iterator[str]:
        """Answer messages."""
        fields = {
            "model": self.name,
            "messages": list(_with_images(messages, images)),
            "stream": True,
            **_of_openai(options),
        }
        with (
            self._failing(),
            self._client.stream("POST", "/v1/chat/completions", json=fields) as response,
        ):
            if response.status_code != 200:
                response.read()
                raise self._refused(response)
            for event in self._events(response):
                if "error" in event:
                    raise self._error(event, response.status_code)
                for choice in event.get("choices", ()):
                    yield choice.get("delta", {}).get("content") or ""

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _events(self, response: httpx.Response) -> Iterator[dict[str, Any]]:
        for line in response.iter_lines():
            kind, _, data = line.partition(":")
            if kind == "data" and data.strip() != "[DONE]" and len(data) < LONGEST_LINE:
                try:
                    event = json.loads(data)
                except ValueError:
                    raise _unreachable(self._url, "an event that is not JSON") from None
                if isinstance(event, dict):
                    yield event

    def _json(self, method: str, path: str, fields: Any = None) -> dict[str, Any]:
        with self._failing():
            response = self._client.request(method, path, json=fields)
        if response.status_code != 200:
            raise self._refused(response)
        try:
            found = response.json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise _unreachable(self._url, f"{path.partition('?')[0]} is not JSON")
        return found

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Turn errors of the connection into ours."""
        try:
            yield
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _unreachable(self._url, str(error) or type(error).__name__) from error

    def _refused(self, response: httpx.Response) -> ServerError:
        try:
            found = response.json()
        except ValueError:
            found = None
        return self._error(found if isinstance(found, dict) else {}, response.status_code)

    def _error(self, found: Mapping[str, Any], status: int) -> ServerError:
        error = found.get("error")
        message = error.get("message") if isinstance(error, Mapping) else error
        return ServerError(
            f"the server answered {status}: {cut(str(message or 'no reason given'), 500)}",
            hint="see the log of the server",
            code="server.refused",
        )


def _of_openai(options: Mapping[str, Any]) -> dict[str, Any]:
    """Rename options to OpenAI's names."""
    fields = {name: value for name, value in options.items() if name != "do_sample"}
    if "max_new_tokens" in fields:
        fields["max_tokens"] = fields.pop("max_new_tokens")
    if options.get("do_sample") is False:
        fields["temperature"] = 0
    return fields


def _with_images(messages: Sequence[Message], images: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Write messages as OpenAI has them, with the images as data: URLs."""
    rest = iter(images)
    for message in messages:
        content = [
            {"type": "image_url", "image_url": {"url": _data_url(next(rest))}}
            if part["type"] == "image"
            else {"type": "text", "text": part["text"]}
            for part in message["content"]
        ]
        if message["role"] == "assistant":  # text alone
            yield {"role": "assistant", "content": "".join(part["text"] for part in content)}
        else:
            yield {"role": message["role"], "content": content}


def _data_url(path: str) -> str:
    kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"


def _unreachable(url: str, why: str) -> ServerError:
    return ServerError(
        f"{cut(url)}: {cut(why)}",
        hint="check the address; `vlmport serve` prints that of a server when it starts",
        code="server.unreachable",
    )
