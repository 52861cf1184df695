"""`Settings`: what a server listens on, allows and limits. docs/serving.md describes each."""

from __future__ import annotations

import hmac
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from vlmport.errors import OptionError

MEGABYTE = 1_000_000
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class Settings:
    """What a server listens on, allows and limits.

    Attributes:
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        api_keys: keys, one of which a request has to give; () serves everybody.
        allowed_hosts: further names in the Host header that are answered.
        cors_origins: origins whose pages may call this server.
        allow_images_from: hosts that images are fetched from; () fetches nothing.
        max_body_bytes: maximum size of the body of a request.
        max_images: maximum number of images in a request.
        max_image_bytes: maximum size of an image, as a file.
        max_characters: maximum number of characters of all texts of a request.
        max_answers: maximum of `n`.
        body_seconds: maximum time for a client to send the body.
        time_limit: maximum time from a request to the end of its answer, in seconds.
        grace: how long running requests may go on after SIGTERM, in seconds.
        max_models: maximum number of models that are open at a time.
        preload: open the models at the start, not at their first use.
        max_running: maximum number of answers that are generated at a time, for each model.
        max_queue: maximum number of requests that wait, for each model.
        cache_bytes: maximum size of cached images and prompts, for each model.
        cache_dir: a folder that keeps them for the next start; None for none.
        cache_dir_bytes: maximum size of that folder.
        precision, device, threads: as for `vlmport.load`.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    allow_images_from: tuple[str, ...] = ()
    max_body_bytes: int = 20 * MEGABYTE
    max_images: int = 16
    max_image_bytes: int = 20 * MEGABYTE
    max_characters: int = 400_000
    max_answers: int = 8
    body_seconds: float = 30.0
    time_limit: float = 300.0
    grace: float = 30.0
    max_models: int = 2
    preload: bool = False
    max_running: int = 16
    max_queue: int = 64
    cache_bytes: int = 256 * MEGABYTE
    cache_dir: Path | None = None
    cache_dir_bytes: int = 4000 * MEGABYTE
    precision: str = "auto"
    device: str = "cpu"
    threads: int | None = None

    @property
    def is_local(self) -> bool:
        """Whether the server listens on this machine's loopback address only."""
        return is_loopback(self.host)

    def knows_host(self, header: str) -> bool:
        """Whether a Host header names this server.

        On the loopback address only its own names do: another site's name may resolve to it (DNS
        rebinding). With keys on another address every name does, because such a site has no key.
        """
        name = _without_port(header).lower()
        if name in (*LOOPBACK_NAMES, self.host.lower(), f"[{self.host.lower()}]"):
            return True
        if name in (one.lower() for one in self.allowed_hosts):
            return True
        return not self.is_local and (bool(self.api_keys) or _is_address(name))

    def knows_key(self, given: str) -> bool:
        """Whether a key is one of ours. Compares with each of them, in constant time."""
        found = False
        for key in self.api_keys:
            found |= hmac.compare_digest(key.encode(), given.encode("utf-8", "replace"))
        return found


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reached from this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def read_api_keys(path: Path) -> tuple[str, ...]:
    """Read keys from a file: one a line; empty lines and lines with # are skipped.

    Raises OptionError for a file that can't be read, without keys, or with a key that no header
    can hold.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(
            f"{path}: can't be read: {getattr(error, 'strerror', None) or 'not UTF-8'}",
            hint="write one key a line",
            code="server.bad-key-file",
        ) from error
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    for number, line in enumerate(lines, 1):
        if line in keys and (len(line) < 8 or not line.isascii() or not line.isprintable()):
            raise OptionError(
                f"{path}: line {number}: expected a key of 8 ASCII characters or more",
                hint="`openssl rand -hex 24` makes one",
                code="server.bad-key-file",
            )
    if not keys:
        raise OptionError(
            f"{path}: no keys", hint="write one key a line", code="server.bad-key-file"
        )
    return keys


def check_exposure(settings: Settings, *, no_auth: bool) -> None:
    """Raise OptionError where others could use the server without a key, unless that is wanted."""
    if not settings.is_local and not settings.api_keys and not no_auth:
        raise OptionError(
            f"--host {settings.host} lets other machines use this server, and there is no key",
            hint="--api-key-file FILE, or --no-auth to serve everybody who reaches it",
            code="server.open-without-key",
        )


def _without_port(header: str) -> str:
    name, colon, port = header.strip().rpartition(":")
    return name if colon and port.isdecimal() else header.strip()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
