"""Translate OpenAI's options of a chat request into those of `VLM.generate`."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from vlmport.errors import OptionError, quoted
from vlmport.serve.api_errors import RequestError
from vlmport.serve.schemas import (
    ChatRequest,
    JsonSchemaFormat,
    ObjectFormat,
    OwnOptions,
    TextFormat,
)
from vlmport.serve.settings import Settings

OWN = tuple(name for name in OwnOptions.model_fields if name not in ("image_options", "regex"))
ANY_OBJECT = {"type": "object"}
SEEDS = 2**32
# Option of `VLM.generate` → field of a chat request.
RENAMED: Mapping[str, str] = {
    "num_return_sequences": "n",
    "max_new_tokens": "max_completion_tokens",
    "stop_strings": "stop",
    "sequence_bias": "logit_bias",
    "json_schema": "response_format",
    "lark_grammar": "tools",
}
SHAPES = ("top_k", "min_p", "typical_p")


def generation_options(
    request: ChatRequest, defaults: Mapping[str, Any], settings: Settings, context: int
) -> dict[str, Any]:
    """Return keyword arguments for `VLM.generate`.

    Without a temperature, tokens are chosen as the bundle's defaults say. With one above 0 they are
    sampled as OpenAI does it: from all tokens, not from Hugging Face's 50.

    Args:
        defaults: the bundle's own options.
        context: number of tokens of the model's context.

    Raises RequestError for fields that contradict each other, or exceed a limit.
    """
    options: dict[str, Any] = {
        name: getattr(request, name) for name in OWN if getattr(request, name) is not None
    }
    options |= sampling(request, defaults, options)
    if request.temperature == 0:
        options = {name: value for name, value in options.items() if name not in SHAPES}
    for name in ("presence_penalty", "frequency_penalty"):
        if getattr(request, name):
            options[name] = getattr(request, name)
    if (length := answer_length(request)) is not None:
        options["max_new_tokens"] = length
    if request.stop:
        options["stop_strings"] = request.stop
    if request.logit_bias:
        options["sequence_bias"] = _biases(request.logit_bias)
    options |= _logprobs(request) | _grammar(request)
    is_bound = request.response_format is not None or request.regex is not None or request.tools
    if is_bound and not isinstance(request.response_format, TextFormat):
        options.setdefault("max_new_tokens", context)  # a bundle's default cuts most JSON
    answers = request.n or 1
    if answers > settings.max_answers:
        raise RequestError(
            f"n={answers}, this server gives at most {settings.max_answers} answers",
            hint="send several requests, or start the server with a larger --max-answers",
            code="server.too-many-answers",
            param="n",
        )
    if answers > 1 and (options.get("do_sample") or options.get("num_beams", 1) > 1):
        options["num_return_sequences"] = answers
    return options


def sampling(
    request: ChatRequest, defaults: Mapping[str, Any], own: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the options that decide between the most likely tokens and sampled ones.

    temperature=0 takes the most likely token, whatever top_p, top_k, min_p and typical_p say.
    """
    options: dict[str, Any] = {}
    warms = request.temperature not in (None, 0)
    shapes = (request.top_p or 1) < 1 or own.keys() & set(SHAPES)
    do_sample = own.get("do_sample")
    if do_sample is None:
        if request.temperature == 0:
            do_sample = False
        elif warms or (shapes and request.temperature is None):
            do_sample = True
        else:
            do_sample = bool(defaults.get("do_sample", False))
    elif do_sample and request.temperature == 0:
        raise RequestError(
            "temperature=0 and do_sample=true contradict each other",
            hint="leave one of them out",
            code="option.contradiction",
            param="temperature",
        )
    elif not do_sample and (warms or (request.top_p or 1) < 1):
        field = "temperature" if warms else "top_p"
        raise RequestError(
            f"{field}={getattr(request, field):g} and do_sample=false contradict each other",
            hint="leave one of them out",
            code="option.contradiction",
            param=field,
        )
    options["do_sample"] = do_sample
    if not do_sample:  # a seed and top_p choose nothing where the most likely token is taken
        return options
    if warms:
        options["temperature"] = request.temperature
    if request.top_p:
        options["top_p"] = request.top_p
    elif request.top_p == 0:  # only the most likely token is left
        options["top_k"] = 1
    if "top_k" not in own and "top_k" not in defaults:
        options.setdefault("top_k", 0)
    if request.seed is not None:
        options["seed"] = request.seed % SEEDS
    return options


@contextlib.contextmanager
def named_as_fields(
    request: ChatRequest, options: Mapping[str, Any], renamed: Mapping[str, str] = RENAMED
) -> Iterator[None]:
    """Name the fields of the request in an OptionError, not the options that they became.

    Args:
        options: those of `VLM.generate`.
        renamed: option → field, where their names differ.

    Raises RequestError.
    """
    try:
        yield
    except OptionError as error:
        names = dict(renamed)
        if request.max_tokens is not None and names["max_new_tokens"] == RENAMED["max_new_tokens"]:
            names["max_new_tokens"] = "max_tokens"
        message = str(error)
        if (grammar := options.get("lark_grammar")) is not None:  # made here, of the tools
            message = message.replace(f"lark_grammar={quoted(grammar, 80)}", "tools")
        words = re.compile(rf"\b({'|'.join(names)})\b")

        def said(text: str) -> str:
            return words.sub(lambda found: names[found[0]], text)

        message, fields = said(message), {*options, *names.values()} - {*names}
        at = {name: found.start() for name in fields if (found := _word(name).search(message))}
        first = min(at, key=at.__getitem__, default=None)
        raise RequestError(
            message,
            hint=None if error.hint is None else said(error.hint),
            code=error.code,
            param="image_options" if "image option" in message else first,
        ) from error


def _word(name: str) -> re.Pattern[str]:
    return re.compile(rf"\b{re.escape(name)}\b")


def other_characters(request: ChatRequest) -> int:
    """Count the characters of the texts that are not in messages; tools are in the system's."""
    form = request.response_format
    schema = form.json_schema.json_schema if isinstance(form, JsonSchemaFormat) else None
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or ()
    texts = (request.regex or "", "" if schema is None else json.dumps(schema), *stops)
    return sum(map(len, texts))


def answer_length(request: ChatRequest) -> int | None:
    """Return the maximum number of new tokens, by either of its names."""
    old, new = request.max_tokens, request.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise RequestError(
            f"max_tokens={old} and max_completion_tokens={new}",
            hint="give one of them",
            code="option.contradiction",
            param="max_tokens",
        )
    return old if new is None else new


def _biases(given: Mapping[str, float]) -> list[tuple[list[int], float]]:
    for token in given:
        if not token.isdecimal() or len(token) > 9:
            raise RequestError(
                f"logit_bias: {token[:40]!r} is no token id",
                hint='for example {"50256": -100}, with ids of this model\'s tokenizer',
                code="server.wrong-value",
                param="logit_bias",
            )
    return [([int(token)], bias) for token, bias in given.items()]


def _logprobs(request: ChatRequest) -> dict[str, Any]:
    if request.logprobs:
        return {"logprobs": request.top_logprobs or 0}
    if request.top_logprobs:
        raise RequestError(
            "top_logprobs without logprobs",
            hint="give logprobs=true too",
            code="option.contradiction",
            param="top_logprobs",
        )
    return {}


def _grammar(request: ChatRequest) -> dict[str, Any]:
    form = request.response_format
    schema: Any = None
    if isinstance(form, ObjectFormat):
        schema = ANY_OBJECT
    elif isinstance(form, JsonSchemaFormat):
        schema = form.json_schema.json_schema or ANY_OBJECT
    if request.regex is not None and schema is not None:
        raise RequestError(
            "regex and response_format contradict each other",
            hint="leave one of them out",
            code="option.contradiction",
            param="regex",
        )
    if schema is not None:
        return {"json_schema": schema}
    return {} if request.regex is None else {"regex": request.regex}
