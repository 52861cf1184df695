"""Write docs/errors.md from the classes of errors and the catalogue of their codes.

python -m tests.errors_reference [--check]
"""

from __future__ import annotations

import re
import sys
from itertools import groupby
from pathlib import Path

from tests.error_codes import class_facts, classes, is_a
from vlmport.error_codes import Problem, catalogue

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "errors.md"
WEB_ONLY = {
    "DownloadError": "The network or the server failed, and trying again did not help.",
    "WorkerError": "The worker could not start, or has ended.",
}
INTRODUCTION = """\
# Errors

<!-- Generated: python -m tests.errors_reference -->

Every error that a user can cause is a `VlmportError` with a message, a `hint` that says what to do
next, and a `code`. The code is a stable name of the problem: the text of a message may change
between versions, its code does not. The Python and the TypeScript package have the same codes.
Warnings have a code too.

The command line prints the code:

```text
error[image.not-found]: photo.jpg: no such file
hint: check the path
```

A program compares the code, and never the message:

```python
from vlmport.errors import VlmportError

try:
    caption = model.caption("photo.jpg")
except VlmportError as error:
    if error.code == "image.too-large":
        ...
    print(error.to_json())  # {"code": …, "message": …, "hint": …}
```

```ts
try {
  await vlm.caption(file);
} catch (error) {
  if (error instanceof VlmportError && error.code === 'image.too-large') …
}
```

## Exit codes

| Exit code | Meaning |
| --- | --- |
| 0 | Done. |
| 1 | `verify`, `eval` or `inspect --probe` found a fault, or no program reads the output. |
| 2 | Bad input, or an output that can't be written. |
| 129, 130, 143 | Ended by SIGHUP, by Ctrl-C, by SIGTERM. |

## Classes

All are in `vlmport.errors`, except for `UnrecordedError` (`vlmport.verify`) and
`UnrecordedResultError` (`vlmport.evaluation`). `DownloadError` and `WorkerError` are kinds of the
TypeScript package only.
"""


def page() -> str:
    """The whole page."""
    rows = [_class_row(name) for name in _ordered()]
    rows += [f"| `{name}` | `VlmportError` | | {text} |" for name, text in WEB_ONLY.items()]
    table = "\n".join(
        ["| Class | Base | Exit code | Meaning |", "| --- | --- | --- | --- |", *rows]
    )
    parts = [INTRODUCTION, f"{table}\n", "## Codes\n"]
    for noun, codes in groupby(catalogue().items(), key=lambda one: one[0].partition(".")[0]):
        lines = [_code_row(code, problem) for code, problem in codes]
        head = ["| Code | Class | Meaning | What to do |", "| --- | --- | --- | --- |"]
        parts.append(f"### {noun}\n\n" + "\n".join([*head, *lines]) + "\n")
    return "\n".join(parts)


def _ordered() -> list[str]:
    """Errors before warnings, the base of each kind first."""
    bases = ["VlmportError", "VlmportWarning"]
    names = dict.fromkeys([*bases, *sorted(classes())])
    return sorted(names, key=lambda name: (is_a(name, "VlmportWarning"), name not in bases))


def _class_row(name: str) -> str:
    text, exit_code = class_facts(name)
    base = classes().get(name, "Exception")
    code = "" if exit_code is None else exit_code
    return f"| `{name}` | `{base}` | {code} | {_cell(text)} |"


def _code_row(code: str, problem: Problem) -> str:
    names = ", ".join(f"`{name}`" for name in problem.classes)
    more = f" [More]({anchor})." if (anchor := more_about().get(code)) else ""
    what = f"{_cell(problem.meaning)} | {_cell(problem.remedy)}{more}"
    return f'| <a id="{code}"></a>`{code}` | {names} | {what} |'


def more_about() -> dict[str, str]:
    """Code → the place in troubleshooting.md whose heading names it."""
    found = {}
    text = (DOCS / "troubleshooting.md").read_text("utf-8")
    for heading in re.findall(r"^### (.+)$", text, re.MULTILINE):
        slug = re.sub(r"[^\w\s-]", "", heading).strip().lower().replace(" ", "-")
        for code in re.findall(r"`([a-z]+\.[a-z0-9-]+)`", heading):
            found[code] = f"troubleshooting.md#{slug}"
    return found


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> int:
    text = page()
    if "--check" in sys.argv[1:]:
        if PAGE.is_file() and PAGE.read_text("utf-8") == text:
            return 0
        print(f"{PAGE} is out of date: python -m tests.errors_reference", file=sys.stderr)
        return 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
