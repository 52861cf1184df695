"""What a graph says that refuses its input: the reason is the name of the node that failed."""

from __future__ import annotations

import re

# As graph/refusal.py writes it, within ONNX Runtime's message.
REFUSED = re.compile(r"Name:'(?:[^']*/)?refused: (?P<reason>.*?) \| (?P<hint>.*?)' Status Message")


def refusal(error: Exception) -> tuple[str, str] | None:
    """The reason and the hint of a graph that refuses its input; None for any other error."""
    found = REFUSED.search(str(error))
    return None if found is None else (found["reason"], found["hint"])
