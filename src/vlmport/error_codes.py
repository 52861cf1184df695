"""The catalogue of error codes: what each means and what to do (error_codes.toml)."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

__all__ = ["Problem", "catalogue"]


@dataclass(frozen=True)
class Problem:
    """One kind of problem.

    Attributes:
        classes: names of the classes of errors or warnings that it comes with. DownloadError and
            WorkerError exist in the TypeScript package only.
        meaning: one sentence or two.
        remedy: what to do.
    """

    classes: tuple[str, ...]
    meaning: str
    remedy: str


@functools.cache
def catalogue() -> Mapping[str, Problem]:
    """Code → its problem, in alphabetical order."""
    text = resources.files("vlmport").joinpath("error_codes.toml").read_text("utf-8")
    return {
        code: Problem(tuple(one["classes"]), one["meaning"], one["remedy"])
        for code, one in tomllib.loads(text).items()
    }
