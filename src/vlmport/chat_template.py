"""Chat templates: Jinja as transformers has it, in a sandbox, and bounded.

A template comes with a model from anywhere. The sandbox keeps it from the process; the bounds keep
it from running for ever or taking all memory. Each pass of a loop, each call and each value that
is made asks the clock; every value that a template makes has a largest size, and so have all of
them together, and what is written, in macros too. What makes long text of short is weighed before
it runs. What one operation can take is not bounded to the byte, nor to the millisecond.

Traps:
- A list may hold another twice, that one a third twice, …: forty lines come to 2**40 items where
  they are written or compared. So a list weighs what all of its items do, each time they occur.
- Jinja computes constants while it compiles, before any clock runs: here it does not.

Source: transformers 5.23, chat_template_utils.py, _cached_compile_jinja_template.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
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

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
SECONDS = 10.0  # of one rendering; the templates of real models take milliseconds
CHARACTERS = 1 << 24  # that a template writes; characters of any value that it makes
ITEMS = 1 << 20  # of any list that it makes
MADE = 1 << 28  # characters of all values that it makes
ITEM = 64  # characters that an item of a list counts as among these: so many bytes, about
BITS = 4096  # of a number
# Filters and methods whose numbers say how much they make, …
SIZING = ("batch", "center", "ljust", "rjust", "slice", "zfill")
# … those where they say it of each character or line, …
GROWING = ("expandtabs", "indent", "tojson", "translate", "wordwrap")
# … and those whose time grows with the square of their text or list, which is short therefore.
SLOW = ("pprint", "striptags", "sum", "urlize", "wordwrap")
SHORT = 1 << 16
FORMATS = ("format", "format_map")
LISTING = ("join", "sum")  # filters whose input is weighed as a list
WIDTH = re.compile(r"\d+")
WIDTH_GIVEN = re.compile(r"\*|\{[^{}]*\{")  # a width that is an argument
CONTAINERS = (list, tuple, dict)


@dataclass
class _Spent:
    """What one rendering has taken so far."""

    until: float
    characters: int = 0
    made: int = 0
    # By id, with the container, which none can be changed nor freed while it is here.
    weights: dict[int, tuple[Any, int]] = field(default_factory=dict)

    def ask_the_clock(self) -> None:
        if time.monotonic() > self.until:
            raise jinja2.TemplateError(f"it has not ended after {SECONDS:g} seconds")

    def step(self, characters: int) -> None:
        self.characters += characters
        if self.characters > CHARACTERS:
            raise jinja2.TemplateError(f"it writes more than {CHARACTERS} characters")
        self.ask_the_clock()

    def make(self, characters: int) -> None:
        self.made += characters
        if self.made > MADE:
            raise jinja2.TemplateError(f"it makes values of more than {MADE} characters")
        self.ask_the_clock()

    def weight(self, value: Any) -> int:
        """About how many characters a value comes to where it is written."""
        if not isinstance(value, CONTAINERS):
            return len(value) if isinstance(value, str) else 1
        if id(value) not in self.weights:
            parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
            self.weights[id(value)] = value, 1 + sum(map(self.weight, parts))
        return self.weights[id(value)][1]


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Of tokenizer_config.json, what a template may write by name; plain there, or objects."""
    found = {name: config.get(name) for name in SPECIAL_TOKENS}
    texts = {
        name: one.get("content") if isinstance(one, Mapping) else one for name, one in found.items()
    }
    return {name: text for name, text in texts.items() if text is not None}


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


@jinja2.pass_context  # which keeps Jinja from computing constants early
def count_written(context: Any, value: Any) -> Any:
    """Sees all that a template writes."""
    spent = _spent.get()
    spent.step(spent.weight(value))
    return value


def joined(*values: Any) -> str:
    """What `~` does, bounded."""
    check_size(sum(map(_spent.get().weight, values)), CHARACTERS)
    return sized("".join(map(str, values)))


def sized(value: Any) -> Any:
    """The value. Raises jinja2.TemplateError for one of a size that no prompt needs."""
    spent = _spent.get()
    if isinstance(value, int):
        check_size(value.bit_length(), BITS)
    elif isinstance(value, str):
        check_size(len(value), CHARACTERS)
        spent.make(len(value))
    elif isinstance(value, CONTAINERS):
        check_size(len(value), ITEMS)
        spent.make(ITEM * (1 + len(value)))
        check_size(spent.weight(value), CHARACTERS)
    return value


def check_size(size: int, most: int) -> None:
    if size > most:
        raise jinja2.TemplateError(f"it makes a value of size {size}; at most {most}")


def check_call(name: str, subject: Any, arguments: Sequence[Any]) -> None:
    """Check what a filter, or a method of a text, would make of these."""
    weight = _spent.get().weight
    numbers = [abs(one) for one in arguments if isinstance(one, int)]
    most = ITEMS if name in ("batch", "slice") else CHARACTERS
    if name in SIZING:
        check_size(max(numbers, default=0), most)
    elif name in FORMATS and isinstance(subject, str):
        check_format(subject, subject.count("{") + subject.count("%"), arguments)
    elif name == "replace" and len(arguments) > 1 and isinstance(subject, str):
        old, new = map(str, arguments[:2])
        check_size(subject.count(old) * len(new), CHARACTERS)
    elif name == "join":
        is_method = isinstance(subject, str)  # a filter's text has become a list
        parts, between = (arguments[:1], [subject]) if is_method else ([subject], arguments)
        for one in parts:
            if isinstance(one, (str, *CONTAINERS)):
                check_size(weight(one) + len(one) * sum(map(weight, between)), CHARACTERS)
    if name in GROWING:
        times = max([1, *numbers, *map(weight, arguments)])
        check_size(weight(subject) * times, CHARACTERS)
    if name in SLOW:
        check_size(weight(subject), SHORT)


def check_format(form: str, fields: int, arguments: Iterable[Any]) -> None:
    """Check what a text with so many fields would become: its widths, and its arguments."""
    arguments = list(arguments)
    size = sum(int(width[:20]) for width in WIDTH.findall(form))
    size += fields * sum(map(_spent.get().weight, arguments))
    if WIDTH_GIVEN.search(form):
        size += fields * sum(abs(one) for one in arguments if isinstance(one, int))
    check_size(size, CHARACTERS)


def _bounded(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A filter of bounded arguments and results."""

    @functools.wraps(function)  # Jinja's own marks are among its attributes
    def call(*args: Any, **kwargs: Any) -> Any:
        at = 1 if hasattr(function, "jinja_pass_arg") else 0  # before it stands what Jinja passes
        if name in LISTING and len(args) > at and isinstance(args[at], str | Iterator):
            args = (*args[:at], sized(list(args[at])), *args[at + 1 :])
        check_call(name, args[at] if len(args) > at else "", [*args[at + 1 :], *kwargs.values()])
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

    def made(self, node: Any) -> Any:
        self.generic_visit(node)
        is_target = getattr(node, "ctx", "load") != "load"
        if is_target or all(isinstance(one, nodes.Const) for one in node.iter_child_nodes()):
            return node
        return _call(sized, [node], node.lineno)

    visit_List = visit_Tuple = visit_Dict = made  # noqa: N815

    def visit_Getitem(self, node: nodes.Getitem) -> Any:  # noqa: N802
        self.generic_visit(node)
        is_slice = isinstance(node.arg, nodes.Slice)
        return _call(sized, [node], node.lineno) if is_slice else node

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
        super().__init__(finalize=count_written, optimized=False, **options)
        for name, function in self.filters.items():
            self.filters[name] = _bounded(function, name)
        del self.globals["lipsum"]  # makes texts of any length

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = Counting().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """As the sandbox says. Nothing makes bytes, which nothing here weighs."""
        return attr not in ("encode", "to_bytes") and super().is_safe_attribute(obj, attr, value)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """As the sandbox calls; a method of a text has bounded arguments."""
        _spent.get().ask_the_clock()
        text = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        if isinstance(text, str):
            if function.__name__ in LISTING and args and isinstance(args[0], Iterator):
                args = (sized(list(args[0])), *args[1:])
            check_call(function.__name__, text, [*args, *kwargs.values()])
        return sized(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """As Python computes it, where the result can't be too large."""
        if operator == "%" and isinstance(left, str):
            check_format(left, left.count("%"), right if isinstance(right, tuple) else [right])
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            check_size(left.bit_length() * right, BITS)
        elif operator == "*":
            times, text = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(times, int) and isinstance(text, str | list | tuple):
                check_size(times * _spent.get().weight(text), CHARACTERS)
                check_size(times * (len(text) if isinstance(text, CONTAINERS) else 0), ITEMS)
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

    def __repr__(self) -> str:
        return "<Namespace>"  # what it holds can change, so that nobody can weigh it

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
