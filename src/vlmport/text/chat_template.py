"""Render chat templates as transformers does, in Jinja's sandbox and with limits.

A template comes with a model from an unknown source. The sandbox protects this process, but not
from a template that never ends or takes all memory. So a template is rendered in a process that can
be killed (`vlmport.text.killable`), unless it is one of the known ones below.

Source: transformers 5.23, chat_template_utils.py, _cached_compile_jinja_template.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from vlmport.errors import TokenizerError, quoted
from vlmport.text.killable import MESSAGE, TIME, RefusedError, StoppedError, Worker

if TYPE_CHECKING:
    from jinja2.nodes import Node
    from jinja2.parser import Parser

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")

# SHA-256 of reviewed templates, which are rendered in this process, so the first prompt is fast.
KNOWN = frozenset(
    {
        "830005085ddd94cec605b6e21b885b28ffad6e3f82ee6a212c523533e8f04f01",  # SmolVLM
        "a0bc6f6fc7a29a80017a433e8f03a1cc1236e838a944a2d034295a60c4f2fddb",  # Qwen2.5-VL
        "3636d0f0bd6bef02654cdffdc447b79cb2cef8ab02cc75267345946291a489e4",  # Qwen3-VL
        "9eb4716bd451d7dbd6a28e0fc89bf4e9f6d4082bab161e8420fa0e5dbf7b9538",  # shapes-qwen2.5-vl
        "48f45d70f1b924162687e836e10c313378e4d0f0bbcddf73fde64fbdb97116af",  # shapes-qwen3-vl
        "7a8e94bc59d8b55999adf86170c7520f053c39ee0c6023d89a26332eac8f6593",  # image captioners
    }
)

WORKER = Worker("template")


class TemplateLimitError(jinja2.TemplateError):
    """A template that was stopped.

    Attributes:
        code: the code of the error that a user sees.
    """

    def __init__(self, message: str, *, code: str):
        super().__init__(message)
        self.code = code


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Read the special tokens that a template may name from tokenizer_config.json, where they are
    texts or objects.

    Raises TokenizerError for a special token that is not a text.
    """
    found = {name: config.get(name) for name in SPECIAL_TOKENS}
    texts = {
        name: one.get("content") if isinstance(one, Mapping) else one for name, one in found.items()
    }
    texts = {name: text for name, text in texts.items() if text is not None}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise TokenizerError(
                f"tokenizer_config.json: {name} is {quoted(text, 80)}, expected a string",
                hint="give the token as a string, such as '</s>'",
                code="tokenizer.special-token-type",
            )
    return texts


def render_template(
    source: str,
    marked: Callable[[str], str] = str,
    worker: Worker = WORKER,
    /,
    **variables: Any,
) -> str:
    """Render a chat template with plain data; other objects become the name of their type.

    Args:
        marked: returns the source to render, with other names of tokens.

    Raises jinja2.TemplateError with at most 200 characters, TemplateLimitError at a limit.
    """
    try:
        plain = json.loads(json.dumps(variables, default=_inert))
    except (TypeError, ValueError, RecursionError) as error:
        raise jinja2.TemplateError(f"not JSON: {error}"[:MESSAGE]) from error
    is_known = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest() in KNOWN
    source = marked(source)
    if is_known:
        try:
            return render_here(source, plain)
        except Exception as error:  # any exception that unexpected messages cause
            raise jinja2.TemplateError(str(error)[:MESSAGE]) from error
    try:
        return worker.ask({"template": source, "variables": plain})
    except RefusedError as error:
        raise jinja2.TemplateError(str(error)) from None
    except StoppedError as error:
        code = "template.too-slow" if error.reason == TIME else "template.stopped"
        raise TemplateLimitError(str(error), code=code) from None


def _inert(value: Any) -> str:
    """Replace an object by its type's name: a template could call methods that write files."""
    return f"<{type(value).__name__}>"


def render_here(source: str, variables: Mapping[str, Any]) -> str:
    """Render in this process, without limits."""
    return compile_template(source).render(**variables)


class SafeDict:
    """`dict(…)` and `dict.fromkeys(…)` for templates, without the type itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class SafeNamespace(Namespace):
    """`namespace(…)` for templates, whose attributes can't begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any):
        self, args = args[0], args[1:]  # so a template may have an attribute named self
        for name in dict(*args, **kwargs):
            _check_attribute(name)
        Namespace.__init__(self, *args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: str) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace may not store {name!r}")


class GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}`, which marks text to train on; renders its body."""

    tags = {"generation"}  # noqa: RUF012, jinja2 declares it so

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("write_body"), [], [], body).set_lineno(line)

    def write_body(self, caller: Any) -> str:
        return caller()


@functools.lru_cache(maxsize=32)
def compile_template(source: str) -> jinja2.Template:
    """Compile a chat template in the sandbox, with the additions of transformers."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
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
    """Replace Jinja's own filter, which escapes HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
