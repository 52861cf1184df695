"""The parts of the browser runtime that need no browser: web/test/*.test.ts, run by Node."""

from __future__ import annotations

from tests.web.test_web import node, run

__all__ = ["node"]  # a fixture


def test_the_parts_without_a_browser(node: str) -> None:
    run(node, "vitest", "run", "--project", "unit")
