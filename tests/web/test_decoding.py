"""The browser runtime decodes to the same tokens as Python, in Node: web/node/*.test.ts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.web.decodings import PRECISIONS, decodings
from tests.web.test_web import EXAMPLES, node, run
from vlmport.bundle import Bundle

__all__ = ["node"]  # a fixture


def test_the_same_tokens_in_node(
    node: str, built_in: Callable[[str], Bundle], tmp_path: Path
) -> None:
    bundles = {name: built_in(name) for name in PRECISIONS}
    expected = tmp_path / "expected.json"
    expected.write_text(json.dumps(decodings(bundles, EXAMPLES), default=list))
    environment = {
        "VLMPORT_WEB_EXPECTED": str(expected),
        "VLMPORT_WEB_MODELS": json.dumps({name: str(one.folder) for name, one in bundles.items()}),
    }
    run(node, "vitest", "run", "--project", "node", environment=environment)
