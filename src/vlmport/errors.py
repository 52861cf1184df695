"""The errors that a user can cause, and warnings.

The message of an error says what was expected, what was found, and where; `hint` says what to do
next. The command line prints these two lines and exits with `exit_code`, without a traceback.
"""

from __future__ import annotations

import difflib
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

LONGEST = 200  # characters of any one value in a message
MESSAGE = 2000  # characters of a whole message: lists of names are the longest
_RUN = re.compile(rf"\S{{{LONGEST + 1},}}")


class VlmportError(Exception):
    """The base of all errors that a user can cause.

    Attributes:
        hint: one sentence that says what to do next, or None.
        code: a stable name of the problem, such as 'image.unreadable'. The text of a message may
            change; its code does not. The TypeScript package has the same codes.
        exit_code: the exit status of the command line (2: bad input).
    """

    exit_code = 2

    def __init__(self, message: str, *, code: str, hint: str | None = None):
        super().__init__(_bounded(message))
        self.hint = None if hint is None else _bounded(hint)
        self.code = code

    def to_json(self) -> dict[str, str]:
        """Return code, message and, where there is one, hint as a dict."""
        hint = {} if self.hint is None else {"hint": self.hint}
        return {"code": self.code, "message": str(self), **hint}

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (type(self), self.args, self.__dict__)


class VlmportWarning(UserWarning):
    """The base of all warnings: vlmport continues, and the message says how.

    Attributes:
        code: a stable name of the problem, as for an error.
    """

    def __init__(self, message: str, *, code: str):
        super().__init__(_bounded(message))
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (type(self), self.args, self.__dict__)


class OptionWarning(VlmportWarning):
    """A default of generation_config.json is not supported, and is left out."""


class AnswerWarning(VlmportWarning):
    """An answer is not complete."""


class CacheWarning(VlmportWarning):
    """The folder of a cache can't be used, in part or at all; what it would hold is computed."""


class CheckpointWarning(VlmportWarning):
    """Files of a checkpoint disagree; the message says which of them is used."""


class ExportWarning(VlmportWarning):
    """An export leaves something out, or a killed export left something behind."""


class SourceError(VlmportError):
    """A model source (built-in name, folder, Hub id) can't be found or read."""


class ConfigError(VlmportError):
    """A configuration file lacks a key, or has a value that vlmport does not support."""


class WeightError(VlmportError):
    """Weights are missing, surplus, of a wrong shape or unreadable; the message names them."""


class AdapterError(WeightError):
    """A LoRA adapter does not fit its base model."""


class TokenizerError(VlmportError):
    """A tokenizer or chat template is missing or unreadable."""


class ExportError(VlmportError):
    """An export is not possible: the target exists, the disk is full, an unknown precision."""


class BundleError(VlmportError):
    """A bundle is incomplete, damaged or of a newer version."""


class ImageError(VlmportError):
    """An image can't be read, or is too large."""


class PromptError(VlmportError):
    """Messages, chat template and images do not fit together, or into the context."""


class DeviceError(VlmportError):
    """The installed ONNX Runtime does not have a device, or it failed."""


class OptionError(VlmportError):
    """An option is unknown, out of its range, or contradicts another."""


class ServerError(VlmportError):
    """A scheduler or server can't take a request now, or ended it before its answer was complete.

    Attributes:
        retry_after: seconds after which another try is worthwhile; None where it is not known.
    """

    exit_code = 1

    def __init__(
        self, message: str, *, code: str, hint: str | None = None, retry_after: float | None = None
    ):
        super().__init__(message, code=code, hint=hint)
        self.retry_after = retry_after


class DependencyError(VlmportError):
    """A package that is needed is not installed, or is installed in another version."""


class EvaluationError(VlmportError):
    """A bundle can't be measured on these images or reference captions."""


class OutputError(VlmportError):
    """Standard output can't be written, or its reader has ended."""


class VerificationError(VlmportError):
    """`verify` could not run the reference, or its results contradict each other."""

    exit_code = 1


def warn(warning: VlmportWarning) -> None:
    """Give a warning whose place is the line of the user's code that called vlmport.

    However many of our functions are between, Python then shows that line, and shows the warning
    once for it.
    """
    level, frame = 1, sys._getframe(0)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "vlmport":
        level, frame = level + 1, frame.f_back
    warnings.warn(warning, stacklevel=level)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the nearest known name, else an empty string."""
    if len(name) > LONGEST:  # no name of ours is near it, and to compare takes seconds
        return ""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def some_names(names: Iterable[str], limit: int = 8, width: int = 200) -> str:
    """Join names, quoted and sorted, each cut at `width` characters; past `limit` count them."""
    ordered = sorted(names)
    shown = ", ".join(cut(repr(name), width) for name in ordered[:limit])
    return shown + (f", … and {len(ordered) - limit} more" if len(ordered) > limit else "")


def some_problems(problems: Sequence[str], limit: int = 6, width: int = 200) -> str:
    """Join problems, each cut at `width` characters; past `limit` count them.

    Whatever a file holds, a message about it is short.
    """
    shown = [cut(one, width) for one in problems[:limit]]
    rest = len(problems) - limit
    return "; ".join(shown) + (f"; … and {rest} more" if rest > 0 else "")


def quoted(value: object, width: int = LONGEST) -> str:
    """Write a value as Python does, cut at `width` characters, for a message."""
    try:
        return cut(repr(value), width)
    except Exception:  # a number of more than 4300 digits, or an object that can't be written
        return f"a value of type {type(value).__name__}"


def cut(text: str, width: int = LONGEST) -> str:
    """Cut a text at `width` characters."""
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _bounded(text: str) -> str:
    """Cut long values in a message (paths, addresses, all without a space), and a long message."""
    text = _RUN.sub(lambda run: cut(run[0]), text)
    return text if len(text) <= MESSAGE else f"{text[:139]} … {text[-58:]}"


def _unpickled(kind: type[Exception], args: tuple[Any, ...], attributes: dict[str, Any]) -> Any:
    """Make an error from a pickle, which alone would call its class without the code."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(attributes)
    return error
