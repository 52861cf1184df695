"""The program of a killable process: render a template, tokenize a text, or match names.

Requests come as lines of JSON, [seconds, request]; each gets one line back, [kind, value].
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vlmport.text.killable import MESSAGE, SPACE

Service = Callable[[Any], Any]


def main(kind: str, memory: str, answer: str) -> None:
    """Answer requests of one kind until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the other process
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # nothing else may be written among the answers
    service = SERVICES[kind]()
    restrict(int(memory))
    answers.write(b'["ready", null]\n')
    answers.flush()
    for line in requests:
        seconds, request = json.loads(line)
        limit_processor_time(seconds)
        reply = answered(service, request, int(answer))
        answers.write(json.dumps(reply).encode() + b"\n")
        answers.flush()
        if reply[0] == SPACE:
            return  # the remaining memory may be fragmented


def answered(service: Service, request: Any, most: int) -> tuple[str, Any]:
    """Return a request's answer or its error, as (kind, value)."""
    try:
        value = service(request)
        if isinstance(value, str) and len(value) > most:
            return "long", None
    except MemoryError:
        return SPACE, None
    except BaseException as error:  # a Rust panic is not an Exception
        try:
            return "refused", str(error)[:MESSAGE] or type(error).__name__
        except MemoryError:
            return SPACE, None
        except BaseException:  # an error that can't be printed
            return "refused", type(error).__name__
    return "answer", value


def restrict(memory: int) -> None:
    """Limit the memory, and forbid to open files and sockets."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows has no such limits
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))


def limit_processor_time(seconds: float) -> None:
    """Limit the processor time, in case the process that would kill this one has ended."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        soft = math.ceil(time.process_time() + seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


# Jinja imports some modules, and reads the time zone, at first use: after restrict() it can't.
WARM_UP = """{{ '\\n' }}{{ lipsum(1) }}{{ [1] | pprint }}{{ strftime_now('%x') }}{{ [1] | random }}
{{ 'a&amp;b' | striptags }}{{ 'a.b' | urlize }}{{ 'é' | urlencode }}{{ 'a' | wordwrap }}"""


def templates() -> Service:
    import jinja2.debug  # noqa: F401, see WARM_UP

    from vlmport.text.chat_template import render_here

    render_here(WARM_UP, {})

    def render(request: Mapping[str, Any]) -> str:
        return render_here(request["template"], request["variables"])

    return render


def tokenizers() -> Service:
    from tokenizers import Tokenizer

    known: dict[str, Tokenizer] = {}

    def encode(request: Mapping[str, Any]) -> list[int] | None:
        """Tokenize a text; None if the tokenizer must be sent first."""
        name = request["name"]
        if "tokenizer" in request:
            known.clear()
            known[name] = Tokenizer.from_str(request["tokenizer"])
            known[name].no_padding()
            known[name].no_truncation()
        if name not in known:
            return None
        return known[name].encode(request["text"], add_special_tokens=False).ids

    return encode


def patterns() -> Service:
    def first_match(request: Mapping[str, Any]) -> list[int | None]:
        """Return the number of the first pattern that matches each name, or None."""
        compiled = [re.compile(pattern) for pattern in request["patterns"]]
        return [
            next((number for number, one in enumerate(compiled) if one.match(name)), None)
            for name in request["names"]
        ]

    return first_match


SERVICES: dict[str, Callable[[], Service]] = {
    "template": templates,
    "tokenizer": tokenizers,
    "pattern": patterns,
}
