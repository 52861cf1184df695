"""Offer functions to a model that was never told of them, and read its calls.

The tools are described in the system message, and a grammar lets the model write either a text or
one call, whose arguments fit the function's schema. The format is that of Qwen and Hermes:

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Oslo"}}
    </tool_call>
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmport.errors import did_you_mean, quoted
from vlmport.runtime.decoding.grammar import JSON_LAYOUT
from vlmport.serve.api_errors import RequestError
from vlmport.serve.schemas import Function, NamedTool, Tool, ToolCall

OPEN, CLOSE = "<tool_call>\n", "\n</tool_call>"
MARK = "<tool_call>"
MAX_TOOLS = 64


@dataclass(frozen=True)
class Call:
    """A call of a function; the arguments are JSON."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Offer:
    """The functions that an answer may call.

    Attributes:
        functions: those that may be called; () for none.
        required: whether the answer has to be a call.
    """

    functions: tuple[Function, ...] = ()
    required: bool = False

    def __bool__(self) -> bool:
        return bool(self.functions)


def offer_of(
    tools: Sequence[Tool] | None, choice: str | NamedTool | None, param: str = "tools"
) -> Offer:
    """Read `tools` and `tool_choice`. Raises RequestError where they contradict each other."""
    functions = tuple(one.function for one in tools or ())
    if len(functions) > MAX_TOOLS:
        raise RequestError(
            f"{len(functions)} tools, the limit is {MAX_TOOLS}",
            hint="send those that the question needs",
            code="server.too-many-tools",
            param=param,
        )
    names = [one.name for one in functions]
    if len(set(names)) < len(names):
        raise RequestError(
            "two tools have the same name",
            hint="give each function its own name",
            code="server.wrong-value",
            param=param,
        )
    if isinstance(choice, NamedTool):
        wanted = choice.function.name
        chosen = tuple(one for one in functions if one.name == wanted)
        if not chosen:
            raise RequestError(
                f"tool_choice names {quoted(wanted)}, which is not in tools"
                f"{did_you_mean(wanted, names)}",
                hint="give the name of one of the tools",
                code="server.unknown-tool",
                param="tool_choice",
            )
        return Offer(chosen, required=True)
    if choice == "required" and not functions:
        raise RequestError(
            "tool_choice is 'required', and there are no tools",
            hint="give tools",
            code="server.unknown-tool",
            param="tool_choice",
        )
    return Offer() if choice == "none" else Offer(functions, required=choice == "required")


def grammar_of(offer: Offer, schema: Any = None) -> str:
    """Write the grammar of an answer, in llguidance's Lark form.

    Args:
        schema: the JSON schema that the answer fits where it is no call; None for any text.
    """
    rules = []
    for number, function in enumerate(offer.functions):
        name = json.dumps(function.name)
        parameters = {"type": "object", **(function.parameters or {}), "x-guidance": JSON_LAYOUT}
        head = json.dumps(f'{{"name": {name}, "arguments": ')
        rules += [
            f'call{number}: {head} arguments{number} "}}"',
            f"arguments{number}: %json {json.dumps(parameters)}",
        ]
    calls = " | ".join(f"call{number}" for number in range(len(offer.functions)))
    rules.append(f"call: {json.dumps(OPEN)} ({calls}) {json.dumps(CLOSE)}")
    if offer.required:
        return "\n".join(["start: call", *rules])
    if schema is not None:
        rules.append(f"text: %json {json.dumps({**schema, 'x-guidance': JSON_LAYOUT})}")
    else:
        rules += ["text: TEXT", f"TEXT: /(?s:.*)/ & ~/(?s:{MARK}.*)/"]
    return "\n".join(["start: call | text", *rules])


def described(offer: Offer) -> str:
    """Describe the functions for the system message."""
    lines = [json.dumps({"type": "function", "function": _shown(one)}) for one in offer.functions]
    need = "You must call one of these functions." if offer.required else "You may call a function."
    return "\n".join(
        [
            "# Tools",
            "",
            f"{need} Functions are described in <tools></tools>:",
            "<tools>",
            *lines,
            "</tools>",
            "",
            "To call a function, answer with its name and arguments as JSON:",
            OPEN + '{"name": <function-name>, "arguments": <arguments-as-json>}' + CLOSE,
        ]
    )


def _shown(function: Function) -> Mapping[str, Any]:
    return function.model_dump(exclude_none=True, exclude={"strict"})


def written(calls: Sequence[ToolCall]) -> str:
    """Write earlier calls as the model wrote them."""
    texts = []
    for call in calls:
        try:
            arguments = json.loads(call.function.arguments or "{}")
        except ValueError:
            arguments = call.function.arguments
        body = json.dumps({"name": call.function.name, "arguments": arguments}, ensure_ascii=False)
        texts.append(f"{OPEN}{body}{CLOSE}")
    return "\n".join(texts)


def tool_response(text: str) -> str:
    """Write a function's result as a part of the user's next message."""
    return f"<tool_response>\n{text}\n</tool_response>"


def may_be_call(text: str) -> bool:
    """Whether a text that goes on may become a call."""
    return text.startswith(MARK) or MARK.startswith(text)


def read_call(text: str) -> Call | None:
    """Read an answer that is a complete call; None for a text, and for a call that was cut."""
    if not (text.startswith(OPEN) and text.endswith(CLOSE)):
        return None
    try:
        found = json.loads(text[len(OPEN) : -len(CLOSE)])
        return Call(found["name"], json.dumps(found["arguments"], ensure_ascii=False))
    except (ValueError, KeyError, TypeError):
        return None


def refuse_regex(regex: str | None) -> None:
    """Raise RequestError for a regular expression, which a call would not match."""
    if regex is not None:
        raise RequestError(
            "regex and tools contradict each other",
            hint="leave one of them out",
            code="option.contradiction",
            param="regex",
        )
