"""Chat templates: Jinja as transformers has it, in a sandbox, and bounded.

A template comes with a model from anywhere. The sandbox keeps it from the process; the bounds keep
it from running for ever or taking all memory. Each pass of a loop and each call of a macro or block
asks the clock, every value that a template makes has a largest size, and so has what it writes, in
macros too. What one operation can take is not bounded to the byte: `replace` can write long text
for short.

Source: transformers 5.23, chat_template_utils.py, _cached_compile_jinja_template.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

if TYPE_CHECKING:
    from jinja2.nodes import Node
    from jinja2.parser import Parser

SECONDS = 10.0  # of one rendering; the templates of real models take milliseconds
CHARACTERS = 1 << 24  # that a template writes; characters or items of any value that it makes
BITS = 4096  # of a number
# Filters whose numbers say how much they make.
SIZING = ("batch", "center", "format", "indent", "slice", "tojson", "wordwrap")
WIDTH = re.compile(r"\d+")


@dataclass
class _Spent:
    """What one rendering has taken so far."""

    until: float
    characters: int = 0

    def step(self, characters: int) -> None:
        self.characters += characters
        if self.characters > CHARACTERS:
            raise jinja2.TemplateError(f"it writes more than {CHARACTERS} characters")
        if time.monotonic() > self.until:
            raise jinja2.TemplateError(f"it has not ended after {SECONDS:g} seconds")


_spent: ContextVar[_Spent] = ContextVar("_spent")


def render_template(source: str, **variables: Any) -> str:
    """A chat template's text. Raises jinja2.TemplateError, and what else the template raises."""
    template = compile_template(source)
    token = _spent.set(_Spent(time.monotonic() + SECONDS))
    try:
        return template.render(**variables)
    finally:
        _spent.reset(token)


def count_step(characters: int) -> str:
    """Stands at the head of all that a template repeats; so many characters are written there."""
    _spent.get().step(characters)
    return ""


def count_written(value: Any) -> Any:
    """Sees all that a template writes. Constants come by once more when it is compiled."""
    spent = _spent.get(None)
    if spent is not None and isinstance(value, str):
        spent.step(len(value))
    return value


def joined(*values: Any) -> str:
    """What `~` does, bounded."""
    return sized("".join(map(str, values)))


def sized(value: Any) -> Any:
    """The value. Raises jinja2.TemplateError for one of a size that no prompt needs."""
    if isinstance(value, int):
        check_size(value.bit_length(), BITS)
    elif isinstance(value, str | list | tuple | dict):
        check_size(len(value), CHARACTERS)
    return value


def check_size(size: int, most: int) -> None:
    if size > most:
        raise jinja2.TemplateError(f"it makes a value of size {size}; at most {most}")


def check_arguments(values: Iterable[Any], form: str = "") -> None:
    """Check numbers that say how much is made, and the widths in a format."""
    widths = [int(width) for width in WIDTH.findall(form)]
    for size in (*widths, *(abs(one) for one in values if isinstance(one, int))):
        check_size(size, CHARACTERS)


def _bounded(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A filter of bounded arguments and results."""

    @functools.wraps(function)  # Jinja's own marks are among its attributes
    def call(*args: Any, **kwargs: Any) -> Any:
        if name in SIZING:
            form = args[0] if name == "format" and isinstance(args[0], str) else ""
            check_arguments([*args, *kwargs.values()], form)
        return sized(function(*args, **kwargs))

    return call


class Counting(NodeTransformer):
    """Puts the counting into what a template repeats, and into `~`."""

    def repeated(self, node: Any) -> Any:
        self.generic_visit(node)
        texts = [one.data for one in node.find_all(nodes.TemplateData)]
        texts += [one.value for one in node.find_all(nodes.Const) if isinstance(one.value, str)]
        count = _call(count_step, [nodes.Const(sum(map(len, texts)))], node.lineno)
        node.body.insert(0, nodes.ExprStmt(count, lineno=node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = visit_Block = repeated  # noqa: N815, Jinja's names

    def visit_Concat(self, node: nodes.Concat) -> Any:  # noqa: N802
        self.generic_visit(node)
        return _call(joined, node.nodes, node.lineno)


def _call(function: Callable[..., Any], arguments: list[Any], line: int) -> nodes.Call:
    """A call that no name in the template can stand for."""
    imported = nodes.ImportedName(f"{__name__}.{function.__name__}", lineno=line)
    return nodes.Call(imported, arguments, [], None, None, lineno=line)


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """The sandbox, with bounds on what is repeated, made and written."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, **options: Any):
        super().__init__(finalize=count_written, **options)
        for name, function in self.filters.items():
            self.filters[name] = _bounded(function, name)
        del self.globals["lipsum"]  # makes texts of any length

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = Counting().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """As the sandbox calls; a method of a text has bounded arguments."""
        text = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        if isinstance(text, str):
            is_format = function.__name__ in ("format", "format_map")
            check_arguments([*args, *kwargs.values()], text if is_format else "")
        return sized(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """As Python computes it, where the result can't be too large."""
        if operator == "%" and isinstance(left, str):
            check_arguments(right if isinstance(right, tuple) else [right], left)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            check_size(left.bit_length() * right, BITS)
        elif operator == "*":
            times, text = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(times, int) and isinstance(text, str | list | tuple):
                check_size(times * len(text), CHARACTERS)
        return sized(super().call_binop(context, operator, left, right))


class SafeDict:
    """`dict(…)` and `dict.fromkeys(…)` for templates, without the type itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class SafeNamespace(Namespace):
    """`namespace(…)` whose attributes can't begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any):
        self, args = args[0], args[1:]  # so that a template may have an attribute named self
        for name in dict(*args, **kwargs):
            _check_attribute(name)
        Namespace.__init__(self, *args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace may not store {name!r}")


class GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}`, which marks what is trained on: its body."""

    tags = {"generation"}  # noqa: RUF012, jinja2 declares it so

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=32)
def compile_template(source: str) -> jinja2.Template:
    """A chat template, sandboxed and with the additions that transformers gives it."""
    environment = BoundedSandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _bounded(_tojson, "tojson")
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["dict"] = SafeDict()
    environment.globals["namespace"] = SafeNamespace
    return environment.from_string(source)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which no prompt wants."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
