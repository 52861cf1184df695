"""A small local server that plays the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# What a login, or a server for an app of one page, sends for every address.
PAGE = b"<!-- portal -->\n<!DOCTYPE html><html><body>Please log in</body></html>"


class Hub(ThreadingHTTPServer):
    """Plays huggingface.co: repositories and what is wrong with them, by name."""

    daemon_threads = True

    def __init__(self, files: Mapping[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = files
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()

    @classmethod
    @contextlib.contextmanager
    def serving(cls, files: Mapping[str, bytes]) -> Iterator[Self]:
        """A server with these files in every repository, until the block ends."""
        with cls(files) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.05,))
            thread.start()
            yield server
            server.shutdown()
            thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def reply(self, status: int, body: Any = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.server.asked.append(f"{self.command} {path}")
        self.server.tokens.add(self.headers.get("Authorization"))
        repo = "/".join(path.removeprefix("/api/models").strip("/").split("/")[:2])
        if repo == "org/portal" or (repo == "org/pages" and f"/{COMMIT}/" in path):
            self.reply(200, PAGE, Content_Type="text/html", ETag='"page"')
        elif repo == "org/swapped" and f"/{COMMIT}/" in path:
            headers = {"ETag": f'"{digest(PAGE)}"', "X_Repo_Commit": COMMIT}
            self.reply(200, PAGE, Content_Type="text/html", **headers)
        elif repo == "org/missing":
            self.reply(401, {"error": "x"}, X_Error_Code="RepoNotFound")
        elif repo == "org/secret":
            self.reply(401, X_Error_Message="Invalid credentials in Authorization header")
        elif repo == "org/broken":
            self.reply(500, {"error": "oops"})
        elif repo == "org/silent":
            time.sleep(5)
        elif "/revision/" in path and not path.endswith(("/main", "/v1", COMMIT)):
            self.reply(404, {"error": "x"}, X_Error_Code="RevisionNotFound")
        elif path.startswith("/api/models/"):
            self.api(path, repo)
        elif repo == "org/gated":
            self.reply(403, {"error": "x"}, X_Error_Code="GatedRepo")
        elif f"/{COMMIT}/" in path:
            self.file(path)
        else:
            self.reply(404)

    do_HEAD = do_GET  # noqa: N815

    def api(self, path: str, repo: str) -> None:
        if "/tree/" in path:
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": digest(data)}
                for name, data in self.server.files.items()
            ]
            self.reply(200, entries)
        else:
            names = [{"rfilename": name} for name in self.server.files]
            self.reply(200, {"id": repo, "sha": COMMIT, "siblings": names})

    def file(self, path: str) -> None:
        data = self.server.files[path.split(f"/{COMMIT}/")[1]]
        self.reply(200, data, ETag=f'"{digest(data)}"', X_Repo_Commit=COMMIT)


def digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def hub_environment(cache: Path, endpoint: str) -> dict[str, str]:
    """Variables under which a process of its own talks to `endpoint` only."""
    values = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    values |= {"HF_HUB_CACHE": str(cache), "HF_ENDPOINT": endpoint, "HF_HOME": str(cache)}
    return values | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
