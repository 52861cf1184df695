"""Fetch images from the hosts that a policy allows, and from public addresses only.

A request to a server names a URL; without care the server then fetches from its own network for a
stranger. So:

- The URL is parsed here, strictly. Anything that two parsers could read in two ways is refused.
- A name is resolved once. All its addresses must be public, and the connection is opened to one of
  these very addresses; TLS still verifies the name.
- A redirect is a new URL: the same checks apply to it.
- Proxies, cookies and .netrc are not used. A compressed answer is refused, so that the number of
  bytes received is the number of bytes kept.
"""

from __future__ import annotations

import asyncio
import functools
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import IPv6Address
from urllib.parse import quote, urljoin

import httpx

from vlmport.errors import ImageError, OptionError, cut, quoted
from vlmport.serve.public_addresses import is_public, parse_address

__all__ = ["Policy", "RemoteImages", "Resolver"]

Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
"""Host name and port → the addresses of the host, as text."""

PORTS = {"http": 80, "https": 443}
PORT_NUMBERS = range(1, 65536)
LONGEST_URL = 8192
REDIRECTS = (301, 302, 303, 307, 308)
HEADERS = {"accept": "image/*", "accept-encoding": "identity", "user-agent": "vlmport"}
# Object stores give the last two for files whose type they were not told.
TYPES = re.compile(r"image/[\w.+-]+|(application|binary)/octet-stream", re.I | re.A)
VECTOR = "image/svg"  # a text that names other files

_URL = re.compile(
    r"(?P<scheme>https?)://"
    r"(?P<host>\[[0-9a-f:.]+\]|[^/?#\[\]@:\\%]+)"  # no user name and no percent sign
    r"(:(?P<port>[0-9]{1,5}))?"
    r"(?P<target>[/?][^#]*)?(#.*)?",
    re.I | re.A,
)
_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"(?=.{{1,253}}$)({_LABEL}\.)*{_LABEL}", re.A)
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.A)  # such a last label makes an IPv4 address
_ENTRY = re.compile(r"(?P<host>\*|(\*\.)?[^:\[\]*]+|\[[0-9a-f:.]+\])(:(?P<port>[0-9]{1,5}))?", re.A)
_KEPT = "".join(chr(one) for one in range(0x21, 0x7F))  # what is in a path is not escaped twice
_CONTROL = re.compile(r"[\x00-\x20\x7f\\]")


@dataclass(frozen=True)
class Policy:
    """What may be fetched, and how much of it.

    Attributes:
        allowed: hosts. 'example.com' is that host alone, '*.example.com' all hosts below it (but
            not itself), '*' every host that has a name. An address is allowed only where it is
            itself listed. A port other than the scheme's own is named with the host:
            'example.com:8443'. Empty: nothing is fetched.
        schemes: 'https' and 'http', or one of them.
        max_bytes: maximum size of an image.
        timeout: seconds for a whole fetch, with redirects and the wait for its turn.
        max_redirects: maximum number of redirects that are followed.
        max_concurrent: maximum number of fetches at a time.
    """

    allowed: tuple[str, ...] = ()
    schemes: tuple[str, ...] = ("https", "http")
    max_bytes: int = 20_000_000
    timeout: float = 10.0
    max_redirects: int = 3
    max_concurrent: int = 8

    def __post_init__(self) -> None:
        """Raise OptionError for a value that has no meaning."""
        _ = self.hosts
        if not set(self.schemes) <= set(PORTS) or not self.schemes:
            raise OptionError(
                f"schemes: {quoted(self.schemes)}, expected 'https', 'http' or both",
                code="option.wrong-value",
            )
        for name in ("max_bytes", "timeout", "max_concurrent"):
            if not getattr(self, name) > 0:
                raise OptionError(
                    f"{name}: {quoted(getattr(self, name))}, expected more than 0",
                    code="option.wrong-value",
                )
        if self.max_redirects < 0:
            raise OptionError(
                f"max_redirects: {quoted(self.max_redirects)}, expected 0 or more",
                code="option.wrong-value",
            )

    @functools.cached_property
    def hosts(self) -> tuple[AllowedHost, ...]:
        """The entries of `allowed`, parsed."""
        return tuple(_allowed_host(one) for one in self.allowed)


@dataclass(frozen=True)
class AllowedHost:
    """One entry of a policy: a host, hosts below one, or all; and a port other than the usual."""

    host: str
    port: int | None

    def matches(self, target: Target) -> bool:
        """Whether the entry allows the host and port of a target."""
        if target.port != (self.port or PORTS[target.scheme]):
            return False
        if not self.host.startswith("*"):
            return self.host == target.host
        return parse_address(target.host) is None and target.host.endswith(self.host[1:])


@dataclass(frozen=True)
class Target:
    """A URL, parsed."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """Host and port as a Host header and a URL write them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """The whole URL, for redirects and messages."""
        return f"{self.scheme}://{self.authority}{self.path}"


class RemoteImages:
    """Fetches images under a policy. One object serves all requests of an event loop.

    Args:
        policy: what may be fetched.
        resolver: how a name becomes addresses; the operating system's by default.
    """

    def __init__(self, policy: Policy, *, resolver: Resolver | None = None):
        self.policy = policy
        self._turns = asyncio.Semaphore(policy.max_concurrent)
        self._threads = ThreadPoolExecutor(policy.max_concurrent, "vlmport-resolve")
        self._resolve: Resolver = resolver or self._by_system
        self._tls: ssl.SSLContext | None = None

    async def fetch(self, url: str) -> bytes:
        """Return the bytes of the image at a URL.

        Raises ImageError where the policy does not allow it, where an address is not public, and
        where the answer is no image, too large, too slow or incomplete.
        """
        target = parse(url, self.policy)
        try:
            async with asyncio.timeout(self.policy.timeout), self._turns:
                return await self._follow(target)
        except TimeoutError:
            raise ImageError(
                f"{cut(target.url)}: not complete after {self.policy.timeout:g} seconds",
                hint="send the image as a data: URL",
                code="image.url-too-slow",
            ) from None

    def close(self) -> None:
        """End the threads that resolve names."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _follow(self, target: Target) -> bytes:
        for _ in range(self.policy.max_redirects + 1):
            found = await self._get(target)
            if isinstance(found, bytes):
                return found
            target = found
        raise ImageError(
            f"{cut(target.url)}: more than {self.policy.max_redirects} redirects",
            hint="give the URL that the last redirect leads to",
            code="image.url-redirect",
        )

    async def _get(self, target: Target) -> bytes | Target:
        """Return the body, or where a redirect leads."""
        reason: Exception | None = None
        addresses = await self._addresses(target)
        connect = self.policy.timeout / len(addresses)  # each has its turn before the time is over
        for address in addresses:
            try:
                return await self._get_from(target, address, connect)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                reason = error  # the next address may answer
            except httpx.HTTPError as error:
                reason = error
                break
        if isinstance(reason, httpx.TimeoutException):
            raise TimeoutError from reason
        raise _not_fetched(target, str(reason) or type(reason).__name__) from reason

    async def _addresses(self, target: Target) -> Sequence[str]:
        """Resolve a host, once. Raises ImageError unless all its addresses are public."""
        if parse_address(target.host) is not None:
            found: Sequence[str] = [target.host]
        else:
            try:
                found = list(dict.fromkeys(await self._resolve(target.host, target.port)))
            except (OSError, UnicodeError) as error:
                reason = getattr(error, "strerror", None) or error
                raise _not_fetched(target, f"the name has no address: {reason}") from None
            if not found:
                raise _not_fetched(target, "the name has no address")
        for one in found:
            address = parse_address(one)
            if address is None or not is_public(address):
                raise ImageError(
                    f"{cut(target.url)}: the host is not on the public internet",
                    hint="send the image as a data: URL",
                    code="image.url-not-public",
                )
        return found

    async def _by_system(self, host: str, port: int) -> Sequence[str]:
        """Ask the operating system, in a thread of our own: a slow name holds up no other work."""
        work = asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        )
        return [str(one[4][0]) for one in await work]

    async def _get_from(self, target: Target, address: str, connect: float) -> bytes | Target:
        """Send the request to an address that was checked; TLS verifies the host's name.

        A connection is used once: another host at the same address gets a handshake of its own.
        """
        if self._tls is None:
            self._tls = httpx.create_ssl_context()
        dialled = f"[{address}]" if ":" in address else address
        request = httpx.Request(
            "GET",
            f"{target.scheme}://{dialled}:{target.port}{target.path}",
            headers={"host": target.authority, **HEADERS},
            extensions={"sni_hostname": target.host, "timeout": {"connect": connect}},
        )
        # A transport and not a client: it knows neither proxies nor redirects nor cookies.
        async with httpx.AsyncHTTPTransport(verify=self._tls, trust_env=False) as transport:
            response = await transport.handle_async_request(request)
            try:
                if response.status_code in REDIRECTS:
                    return self._redirected(target, response)
                return await self._body(target, response)
            finally:
                await response.aclose()

    def _redirected(self, target: Target, response: httpx.Response) -> Target:
        location = response.headers.get("location")
        if location is None:
            raise _not_fetched(target, f"status {response.status_code} without a location")
        try:
            url = urljoin(target.url, location)
        except ValueError:  # for example an IPv6 address without its bracket
            url = location
        new = parse(url, self.policy)
        if target.scheme == "https" and new.scheme == "http":
            raise ImageError(
                f"{cut(target.url)}: a redirect from https to http",
                hint="give the URL that it leads to",
                code="image.url-redirect",
            )
        return new

    async def _body(self, target: Target, response: httpx.Response) -> bytes:
        if response.status_code != 200:
            raise _not_fetched(target, f"status {response.status_code}")
        kind = response.headers.get("content-type", "").partition(";")[0].strip()
        coding = response.headers.get("content-encoding", "identity").strip().lower()
        if not TYPES.fullmatch(kind) or kind.lower().startswith(VECTOR) or coding != "identity":
            what = f"content type {quoted(kind, 60)}"
            if coding != "identity":
                what = f"content encoding {quoted(coding, 60)}"
            raise ImageError(
                f"{cut(target.url)}: {what}, expected an image, not compressed further",
                hint="give the URL of the image file itself",
                code="image.url-no-image",
            )
        length = response.headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self.policy.max_bytes:
            raise self._too_large(target)
        received = bytearray()
        async for chunk in response.aiter_raw():
            received += chunk
            if len(received) > self.policy.max_bytes:
                raise self._too_large(target)
        return bytes(received)

    def _too_large(self, target: Target) -> ImageError:
        return ImageError(
            f"{cut(target.url)}: more than {self.policy.max_bytes:,} bytes",
            hint="scale the image down",
            code="image.too-large",
        )


def parse(url: str, policy: Policy) -> Target:
    """Parse a URL strictly.

    Raises ImageError for a URL that is not plain http(s), and for a host that is not allowed.
    """
    if not policy.allowed:
        raise _not_allowed("images are not fetched from URLs here")
    found = None if _CONTROL.search(url) or len(url) > LONGEST_URL else _URL.fullmatch(url)
    if found is None:
        raise _invalid(url, "expected http(s)://host/path, without user name, spaces and backslash")
    scheme, host = found["scheme"].lower(), found["host"].lower()
    if scheme not in policy.schemes:
        raise _invalid(url, f"expected {' or '.join(policy.schemes)}")
    if not host.isascii():
        raise _invalid(url, "expected the host in ASCII (xn--…)")
    if host.startswith("["):
        host = _plain_ipv6(host, url)
    elif not _is_plain_host(host):
        raise _invalid(url, "expected a host name, or an address of four decimal numbers")
    port = int(found["port"]) if found["port"] else PORTS[scheme]
    if port not in PORT_NUMBERS:
        raise _invalid(url, f"port {port}")
    path = found["target"] or "/"
    target = Target(scheme, host, port, quote(path if path[0] == "/" else f"/{path}", safe=_KEPT))
    if not any(one.matches(target) for one in policy.hosts):
        raise _not_allowed(f"images are not fetched from {cut(target.authority)}")
    return target


def _plain_ipv6(host: str, url: str) -> str:
    address = parse_address(host[1:-1])
    if not isinstance(address, IPv6Address):
        raise _invalid(url, "expected an IPv6 address in the brackets")
    return str(address)


def _is_plain_host(host: str) -> bool:
    """Whether a host is a name, or an IPv4 address in its one plain form."""
    if _NUMBER.fullmatch(host.rpartition(".")[2]):
        return parse_address(host) is not None
    return _NAME.fullmatch(host) is not None


def _allowed_host(entry: str) -> AllowedHost:
    """Parse an entry of `Policy.allowed`. Raises OptionError for one that names no host."""
    found = _ENTRY.fullmatch(entry.strip().lower())
    if found is not None:
        host, port = found["host"], int(found["port"]) if found["port"] else None
        is_host = host == "*" or _is_plain_host(host.removeprefix("*."))
        if host.startswith("[") and isinstance(address := parse_address(host[1:-1]), IPv6Address):
            host, is_host = str(address), True
        if is_host and (port is None or port in PORT_NUMBERS):
            return AllowedHost(host, port)
    raise OptionError(
        f"{quoted(entry)}: not a host",
        hint="for example 'example.com', '*.example.com', 'example.com:8443', or '*' for all",
        code="option.wrong-value",
    )


def _invalid(url: str, why: str) -> ImageError:
    return ImageError(
        f"{quoted(url, 120)}: {why}",
        hint="give a plain URL, for example https://example.com/cat.jpg, or a data: URL",
        code="image.url-invalid",
    )


def _not_allowed(what: str) -> ImageError:
    return ImageError(
        what,
        hint="send the image as a data: URL; the server's owner allows hosts with "
        "--allow-images-from",
        code="image.url-not-allowed",
    )


def _not_fetched(target: Target, why: str) -> ImageError:
    return ImageError(
        f"{cut(target.url)}: not fetched: {cut(why)}",
        hint="check the URL, or send the image as a data: URL",
        code="image.not-fetched",
    )
