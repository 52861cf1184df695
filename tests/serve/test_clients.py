"""Unmodified clients of OpenAI's API, each in a process of its own, get what the model answers.

tests/serve/clients.py and clients_js/clients.mjs ask; the openai client for Python is in the other
files of this folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

import vlmport
from tests.overlays import overlay
from tests.serve.clients import MODEL, QUESTION, SCHEMA
from tests.serve.conftest import RED_SQUARE
from tests.serve.running import Running

HERE = Path(__file__).parent
JS = HERE / "clients_js"
SECONDS = 300


@pytest.fixture(scope="session")
def python_clients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return overlay("clients", tmp_path_factory.getbasetemp().parent)


@pytest.fixture(scope="session")
def node_clients(tmp_path_factory: pytest.TempPathFactory) -> str:
    """node, after `npm ci` where package-lock.json is newer than what it installed."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        reason = "node and npm are not on PATH: install Node.js 20 or newer (nodejs.org)"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    installed, lock = JS / "node_modules/.package-lock.json", JS / "package-lock.json"
    with FileLock(tmp_path_factory.getbasetemp().parent / "clients_js.lock"):
        if not installed.exists() or installed.stat().st_mtime < lock.stat().st_mtime:
            command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
            done = subprocess.run(command, cwd=JS, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
    return node


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """What the model says alone."""
    parts = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    with vlmport.load(MODEL, threads=1) as model:
        answer = model.generate([{"role": "user", "content": parts}], [RED_SQUARE])
        last = model.generate([{"role": "user", "content": parts[::-1]}], [RED_SQUARE])
        hello = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
        text = model.generate(hello)
    return {
        "answer": answer.text,
        "text": text.text,
        "usage": answer.counts["new_tokens"],
        "image last": {"answer": last.text, "usage": last.counts["new_tokens"]},
    }


def ask(*command: object, path: Path | None = None) -> dict[str, Any]:
    environment = {**os.environ, "OPENAI_API_KEY": "none"}
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(path), str(HERE.parents[1])])
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=SECONDS, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare the answers; each client trims some of them."""
    assert found["answer"].strip() == expected["answer"].strip()
    assert "".join(one or "" for one in found["streamed"]).strip() == expected["answer"].strip()
    assert found["text"].strip() == expected["text"].strip()
    assert found["usage"] == expected["usage"]
    assert json.loads(found["schema"])["color"] in SCHEMA["properties"]["color"]["enum"]
    assert found["error"]["status"] == 404
    assert "is not served here" in found["error"]["message"]


@pytest.mark.parametrize("client", ["litellm", "langchain", "llm"])
def test_a_python_client(
    client: str, server: Running, python_clients: Path, expected: dict[str, Any]
) -> None:
    script = HERE / "clients.py"
    found = ask(sys.executable, script, client, server.url, RED_SQUARE, path=python_clients)
    if client == "llm":  # it sends the image last, and has no tool_choice
        check(found, expected | expected["image last"])
        assert found["offered"]
        return
    check(found, expected)
    assert found["streamed_usage"] == expected["usage"]
    name, arguments = found["tool"]
    assert name == "report"
    assert isinstance(json.loads(arguments)["color"], str)


@pytest.mark.parametrize("client", ["openai", "ai"])
def test_a_client_of_javascript(
    client: str, server: Running, node_clients: str, expected: dict[str, Any]
) -> None:
    found = ask(node_clients, JS / "clients.mjs", client, server.url, RED_SQUARE)
    check(found, expected)
    assert found["streamed_usage"] == expected["usage"]
    name, arguments = found["tool"]
    assert name == "report"
    assert json.loads(arguments)["color"] in SCHEMA["properties"]["color"]["enum"]
