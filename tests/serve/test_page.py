"""/ is the web page with its model, and /docs needs nothing from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.serve.running import running
from vlmport.builtin import builtin_folder
from vlmport.serve import page


def test_the_page_and_the_files_of_the_first_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "assets").mkdir()
    (tmp_path / "index.html").write_text("<title>page</title>")
    (tmp_path / "sw.js").write_text("1")
    (tmp_path / "assets/ort.wasm").write_bytes(b"\0asm")
    (tmp_path.parent / "secret.txt").write_text("secret")
    monkeypatch.setattr(page, "page_folder", lambda: tmp_path)
    with running({"shapes": "shapes"}) as server, server.http() as client:
        found = client.get("/")
        assert found.text == "<title>page</title>"
        assert found.headers["cross-origin-opener-policy"] == "same-origin"
        assert found.headers["content-security-policy"].startswith("default-src 'none'")
        assert client.get("/sw.js").text == "1"
        wasm = client.get("/assets/ort.wasm")
        assert wasm.headers["content-type"] == "application/wasm"
        assert "immutable" in wasm.headers["cache-control"]
        manifest = client.get("/bundle/vlmport.json").json()
        name = next(iter(manifest["files"]))
        part = client.get(f"/bundle/{name}", headers={"range": "bytes=2-5"})
        assert part.status_code == 206
        assert len(part.content) == 4
        for path in ("/bundle/none", "/bundle/../secret.txt", "/assets/%2e%2e/%2e%2e/secret.txt"):
            response = client.get(path)
            assert response.status_code == 404
            assert response.json()["error"]["code"] == "server.no-such-path"
    assert builtin_folder("shapes")


def test_without_a_page_there_are_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "page_folder", lambda: tmp_path)
    with running({"shapes": "shapes"}) as server, server.http() as client:
        links = re.findall(r'href="(.+?)"', client.get("/").text)
        assert links
        for link in links:
            assert client.get(link).status_code == 200
        docs = client.get("/docs").text
        assert "/v1/chat/completions" in docs
        assert "max_completion_tokens" in docs
        assert not re.findall(r'(?:src|href)="(?:https?:)?//', docs)
        assert "<script" not in docs
        document = client.get("/openapi.json").json()
        assert "/caption" in document["paths"]
