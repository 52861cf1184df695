"""Remote images: no spelling of a private address gets a connection, and limits hold.

The tests have a resolver and a listener of their own. A hook of Python's sees every address that
the process connects to, and every name that it asks the system for.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.errors import raises
from vlmport.errors import ImageError, OptionError
from vlmport.serve.public_addresses import is_public, parse_address
from vlmport.serve.remote_images import Policy, RemoteImages, Resolver

TLS = Path(__file__).parent / "tls"  # made for these tests, valid for 100 years
PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(2000)
PUBLIC, PUBLIC_TOO, PUBLIC_V6 = "93.184.216.34", "151.101.1.140", "2606:4700::6810:84e5"
REFUSED = ("image.url-invalid", "image.url-not-public")

Answer = bytes | Callable[[asyncio.StreamWriter], Awaitable[None]]


class Reach:
    """What the process reached for: connections, and names asked of the system."""

    def __init__(self) -> None:
        self.connected: list[Any] = []
        self.asked: list[Any] = []
        self.on = False

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.on and event in ("socket.connect", "socket.sendto"):
            self.connected.append(args[1])
        elif self.on and event == "socket.getaddrinfo":
            self.asked.append(args[0])


_REACH = Reach()
sys.addaudithook(_REACH.hook)  # can't be removed again


@pytest.fixture
def reach() -> Iterator[Reach]:
    _REACH.connected, _REACH.asked, _REACH.on = [], [], True
    yield _REACH
    _REACH.on = False


class Site:
    """A server on loopback that answers by path; `hits` are the requests, `opened` connections."""

    def __init__(self, answers: Mapping[str, Answer]):
        self.answers, self.hits, self.opened, self.port = answers, list[bytes](), 0, 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.opened += 1
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            self.hits.append(head)
            answer = self.answers[head.split()[1].decode()]
            if isinstance(answer, bytes):
                writer.write(answer)
                await writer.drain()
            else:
                await answer(writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                await writer.wait_closed()


@contextlib.asynccontextmanager
async def site(
    answers: Mapping[str, Answer], tls: ssl.SSLContext | None = None
) -> AsyncIterator[Site]:
    one = Site(answers)
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        await one.serve(reader, writer)

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    one.port = server.sockets[0].getsockname()[1]
    try:
        yield one
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.wait_closed()


def answer(body: bytes = PICTURE, kind: str = "image/png", *more: str) -> bytes:
    lines = ["HTTP/1.1 200 OK", f"content-type: {kind}", f"content-length: {len(body)}", *more]
    return "\r\n".join([*lines, "", ""]).encode() + body


def redirect(location: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} Found\r\nlocation: {location}\r\ncontent-length: 0\r\n\r\n".encode()


def resolver(names: Mapping[str, Sequence[str]]) -> Resolver:
    async def resolve(host: str, port: int) -> Sequence[str]:
        return names[host]

    return resolve


@pytest.fixture
def dialled(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[tuple[str, int]]]:
    """Leads connections to PUBLIC… to a port of this machine; returns the list of all dialled."""

    def lead(port: int) -> list[tuple[str, int]]:
        seen: list[tuple[str, int]] = []
        connect = anyio.connect_tcp

        async def connect_tcp(remote_host: str, remote_port: int, **_: Any) -> Any:
            seen.append((remote_host, remote_port))
            if remote_host in (PUBLIC, PUBLIC_V6):
                return await connect("127.0.0.1", port)
            if remote_host == PUBLIC_TOO:
                raise OSError("no route")
            return await connect(remote_host, remote_port)

        monkeypatch.setattr(anyio, "connect_tcp", connect_tcp)
        return seen

    return lead


async def fetch(
    url: str,
    names: Mapping[str, Sequence[str]] | None = None,
    policy: Policy | None = None,
    tls: ssl.SSLContext | None = None,
) -> bytes:
    names = {"pictures.example": [PUBLIC], **(names or {})}
    images = RemoteImages(policy or Policy(("*",)), resolver=resolver(names))
    images._tls = tls
    try:
        return await images.fetch(url)
    finally:
        images.close()


# Addresses in their one plain form, listed in the policy: only the address itself refuses them.
PLAIN = (
    *("127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "10.0.0.1", "10.255.255.255"),
    *("100.64.0.1", "100.100.100.200", "100.127.255.255", "169.254.0.1", "169.254.169.254"),
    *("169.254.170.2", "172.16.0.1", "172.31.255.255", "192.0.0.192", "192.0.2.1", "192.168.0.1"),
    *("192.88.99.1", "198.18.0.1", "198.19.255.255", "198.51.100.1", "203.0.113.1", "224.0.0.1"),
    *("239.255.255.255", "240.0.0.1", "255.255.255.255", "168.63.129.16"),
    *("[::1]", "[::]", "[::127.0.0.1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]"),
    *("[0:0:0:0:0:ffff:a9fe:a9fe]", "[::ffff:0:127.0.0.1]", "[64:ff9b::7f00:1]"),
    *("[64:ff9b::169.254.169.254]", "[64:ff9b:1::a00:1]", "[2002:7f00:1::]", "[2002:a9fe:a9fe::1]"),
    *(
        "[2001::7f00:1]",
        "[2001:0:53aa:64c:0:fb5e:80ff:fffe]",
        "[fe80::1]",
        "[fec0::1]",
        "[fc00::1]",
    ),
    *("[fd00:ec2::254]", "[fd20:ce::254]", "[ff02::1]", "[2001:db8::1]", "[3fff::1]", "[100::1]"),
    *("[2606:4700::5efe:7f00:1]", "[5f00::1]"),
)

# Other spellings of the same, and hosts that another parser might read there. {port} is the
# listener's.
SPELLINGS = (
    "http://2130706433:{port}/",
    "http://017700000001:{port}/",
    "http://0x7f000001:{port}/",
    "http://0x7f.0x0.0x0.0x1:{port}/",
    "http://0177.0.0.1:{port}/",
    "http://0177.0000.0000.0001:{port}/",
    "http://127.1:{port}/",
    "http://127.0.1:{port}/",
    "http://127.0x1:{port}/",
    "http://0:{port}/",
    "http://0x:{port}/",
    "http://127.0.0.1.:{port}/",
    "http://127.0.0.1..:{port}/",
    "http://localhost.:{port}/",
    "http://LOCALHOST:{port}/",
    "http://localhost:{port}/",
    "http://[::1%25lo]:{port}/",
    "http://[::1%lo]:{port}/",
    "http://[::ffff:0x7f.0.0.1]:{port}/",
    "http://[127.0.0.1]:{port}/",
    "http://::1:{port}/",
    "http://①②⑦.⓪.⓪.①:{port}/",
    "http://127。0。0。1:{port}/",
    "http://\uff11\uff12\uff17.0.0.1:{port}/",
    "http://ⓛⓞⓒⓐⓛⓗⓞⓢⓣ:{port}/",
    "http://loc\u00adalhost:{port}/",
    "http://pictures.example@127.0.0.1:{port}/",
    "http://user:word@127.0.0.1:{port}/",
    "http://127.0.0.1:{port}@pictures.example@127.0.0.1:{port}/",
    "http://pictures.example%40127.0.0.1:{port}/",
    "http://pictures.example\\@127.0.0.1:{port}/",
    "http://127.0.0.1:{port}\\@pictures.example/",
    "http://127.0.0.1:{port}#@pictures.example/",
    "http://127.0.0.1:{port}?@pictures.example/",
    "http://%31%32%37.0.0.1:{port}/",
    "http://127.0.0.1%00.pictures.example:{port}/",
    "http://127.0.0.1\x00.pictures.example:{port}/",
    "http://127.0.0.1\t:{port}/",
    "http://127.0.0.1\r\nhost: pictures.example:{port}/",
    " http://127.0.0.1:{port}/",
    "http:127.0.0.1:{port}/",
    "http:/127.0.0.1:{port}/",
    "http:///127.0.0.1:{port}/",
    "http://///127.0.0.1:{port}/",
    "//127.0.0.1:{port}/",
    "http://127.0.0.1:0{port}x/",
    "http://127.0.0.1:+{port}/",
    "http://127.0.0.1: {port}/",
    "http://[0:0:0:0:0:0:0:1]]:{port}/",
    "file:///etc/passwd",
    "file://127.0.0.1:{port}/etc/passwd",
    "gopher://127.0.0.1:{port}/_",
    "ftp://127.0.0.1:{port}/",
    "dict://127.0.0.1:{port}/",
    "ws://127.0.0.1:{port}/",
    "unix:///var/run/docker.sock",
    "http+unix://%2Fvar%2Frun%2Fdocker.sock/",
    "jar:http://127.0.0.1:{port}/!/",
    "http://",
    "http://:{port}/",
    "",
)

# What a name may resolve to. The allowed name itself is fine.
ANSWERS: tuple[tuple[str, ...], ...] = (
    ("127.0.0.1",),
    ("::1",),
    ("10.1.2.3",),
    ("169.254.169.254",),
    ("100.64.1.1",),
    ("::ffff:127.0.0.1",),
    ("::ffff:169.254.169.254",),
    ("64:ff9b::7f00:1",),
    ("2002:7f00:1::1",),
    ("fe80::1%lo",),
    ("fd00::1",),
    ("0.0.0.0",),
    ("224.0.0.251",),
    (PUBLIC, "127.0.0.1"),
    ("127.0.0.1", PUBLIC),
    (PUBLIC_V6, "::1"),
    ("2130706433",),
    ("127.1",),
    ("localhost",),
    ("",),
)


def test_there_are_enough_of_them() -> None:
    assert len(PLAIN) + len(SPELLINGS) + len(ANSWERS) >= 120


def refused(
    url: str, allowed: Sequence[str], reach: Reach, names: Mapping[str, Sequence[str]]
) -> str:
    """Fetch while a server listens at 127.0.0.1:{port}; return the code of the refusal."""

    async def attempt() -> str:
        async with site({"/": answer()}) as listener:
            policy = Policy(tuple(one.format(port=listener.port) for one in allowed))
            before = len(reach.connected)
            with pytest.raises(ImageError) as caught:
                await fetch(url.format(port=listener.port), names, policy)
            await asyncio.sleep(0)
            assert listener.opened == 0
            assert reach.connected[before:] == []
            assert not [one for one in reach.asked if one not in ("127.0.0.1", b"127.0.0.1")]
            return caught.value.code

    return asyncio.run(attempt())


def test_the_hook_and_the_listener_see_a_connection(reach: Reach) -> None:
    async def attempt() -> None:
        async with site({"/": answer()}) as listener:
            _, writer = await asyncio.open_connection("127.0.0.1", listener.port)
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
            while not listener.hits:
                await asyncio.sleep(0.01)
            writer.close()
            await writer.wait_closed()
            assert listener.opened == 1
            assert reach.connected == [("127.0.0.1", listener.port)]

    asyncio.run(attempt())


@pytest.mark.parametrize("host", PLAIN)
def test_an_address_that_is_not_public_gets_no_connection(host: str, reach: Reach) -> None:
    allowed = (host, f"{host}:{{port}}")
    for url in (f"http://{host}:{{port}}/", f"https://{host}:{{port}}/", f"http://{host}/a.png?b"):
        assert refused(url, allowed, reach, {}) == "image.url-not-public"


@pytest.mark.parametrize("url", SPELLINGS)
def test_no_spelling_of_it_gets_a_connection(url: str, reach: Reach) -> None:
    names = {"localhost": ["127.0.0.1"]}
    allowed = ("*", "*:{port}", "127.0.0.1", "127.0.0.1:{port}", "[::1]", "[::1]:{port}")
    assert refused(url, allowed, reach, names) in ("image.url-invalid", "image.url-not-public")


@pytest.mark.parametrize("found", ANSWERS, ids=" ".join)
def test_no_name_of_it_gets_a_connection(found: tuple[str, ...], reach: Reach) -> None:
    code = refused("http://pictures.example/", ("*",), reach, {"pictures.example": found})
    assert code == "image.url-not-public"


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1:{port}/secret",
        "//127.0.0.1:{port}/secret",
        "http://2130706433:{port}/secret",
        "http://[::1]:{port}/secret",
        "http://inside.example/secret",
        "http://pictures.example@127.0.0.1:{port}/secret",
        "file:///etc/passwd",
        "http:\\\\127.0.0.1:{port}\\secret",
        "http://[::1",
        "http://169.254.169.254/latest/meta-data/",
    ],
)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_checked_as_a_new_url(
    location: str, status: int, dialled: Callable[[int], list[tuple[str, int]]]
) -> None:
    async def attempt() -> None:
        answers: dict[str, Answer] = {"/secret": answer(), "/1": redirect("/2")}
        async with site(answers) as listener:
            answers["/2"] = redirect(location.format(port=listener.port), status)
            seen = dialled(listener.port)
            local = [f"{one}:{listener.port}" for one in ("127.0.0.1", "[::1]", "*")]
            allowed = ("*", "169.254.169.254", *local)
            names = {"inside.example": ["10.0.0.1"]}
            with pytest.raises(ImageError) as caught:
                await fetch("http://pictures.example/1", names, Policy(allowed))
            assert caught.value.code in REFUSED
            assert seen == [(PUBLIC, 80)] * 2
            assert not [one for one in listener.hits if b"secret" in one.split(b"\r\n")[0]]

    asyncio.run(attempt())


def test_redirects_are_followed_to_their_limit(
    dialled: Callable[[int], list[tuple[str, int]]],
) -> None:
    async def attempt() -> None:
        chain = {f"/{n}": redirect(f"{n + 1}") for n in range(5)}
        async with site({**chain, "/5": answer(), "/none": b"HTTP/1.1 302 x\r\n\r\n"}) as listener:
            seen = dialled(listener.port)
            assert await fetch("http://pictures.example/2") == PICTURE  # three redirects
            assert len(seen) == 4
            with raises(ImageError, "image.url-redirect", "3"):
                await fetch("http://pictures.example/1")
            with raises(ImageError, "image.url-redirect", "0"):
                await fetch("http://pictures.example/4", policy=Policy(("*",), max_redirects=0))
            with raises(ImageError, "image.not-fetched", "302"):
                await fetch("http://pictures.example/none")

    asyncio.run(attempt())


def test_a_redirect_leads_to_no_host_that_is_not_listed(
    dialled: Callable[[int], list[tuple[str, int]]],
) -> None:
    async def attempt() -> None:
        async with site({"/": redirect("http://other.example/")}) as listener:
            seen = dialled(listener.port)
            names = {"other.example": [PUBLIC]}
            with raises(ImageError, "image.url-not-allowed", "other.example"):
                await fetch("http://pictures.example/", names, Policy(("pictures.example",)))
            assert len(seen) == 1

    asyncio.run(attempt())


def test_a_name_that_changes_its_address_is_dialled_as_it_was_checked(
    dialled: Callable[[int], list[tuple[str, int]]], reach: Reach
) -> None:
    """DNS rebinding: public when checked, loopback when asked again."""

    async def attempt() -> None:
        asked: list[str] = []

        async def rebinding(host: str, port: int) -> Sequence[str]:
            asked.append(host)
            return [PUBLIC] if len(asked) == 1 else ["127.0.0.1"]

        async with site({"/": answer(), "/again": redirect("/")}) as listener:
            seen = dialled(listener.port)
            images = RemoteImages(Policy(("*",)), resolver=rebinding)
            assert await images.fetch("http://pictures.example/") == PICTURE
            assert (asked, seen) == (["pictures.example"], [(PUBLIC, 80)])
            with raises(ImageError, "image.url-not-public"):
                await images.fetch("http://pictures.example/")
            asked.clear()
            with raises(ImageError, "image.url-not-public"):
                await images.fetch("http://pictures.example/again")  # refused at the redirect
            assert len(seen) == 2
            images.close()
        assert {one for one in reach.asked if one is not None} <= {"127.0.0.1", b"127.0.0.1"}

    asyncio.run(attempt())


def test_the_next_address_is_tried_where_one_does_not_answer(
    dialled: Callable[[int], list[tuple[str, int]]],
) -> None:
    async def attempt() -> None:
        async with site({"/a.png?size=2&x=%20": answer()}) as listener:
            seen = dialled(listener.port)
            names = {"pictures.example": [PUBLIC_TOO, PUBLIC_V6]}
            url = "HTTP://Pictures.Example:80/a.png?size=2&x=%20#top"
            assert await fetch(url, names) == PICTURE
            assert seen == [(PUBLIC_TOO, 80), (PUBLIC_V6, 80)]
            lines = listener.hits[0].decode().lower().split("\r\n")
            assert {"host: pictures.example", "accept-encoding: identity"} <= set(lines)
            with raises(ImageError, "image.not-fetched", "pictures.example"):
                await fetch(url, {"pictures.example": [PUBLIC_TOO]})

    asyncio.run(attempt())


@pytest.mark.parametrize(
    ("allowed", "url", "fine"),
    [
        ("pictures.example", "http://pictures.example/", True),
        ("PICTURES.example", "http://Pictures.EXAMPLE/", True),
        ("pictures.example", "http://a.pictures.example/", False),
        ("pictures.example", "http://notpictures.example/", False),
        ("pictures.example", "http://pictures.example.evil.example/", False),
        ("*.pictures.example", "http://a.pictures.example/", True),
        ("*.pictures.example", "http://a.b.pictures.example/", True),
        ("*.pictures.example", "http://pictures.example/", False),
        ("*.pictures.example", "http://notpictures.example/", False),
        ("*", "http://pictures.example/", True),
        ("*", f"http://{PUBLIC}/", False),
        ("*", f"http://[{PUBLIC_V6}]/", False),
        (PUBLIC, f"http://{PUBLIC}/", True),
        (f"[{PUBLIC_V6}]", f"http://[{PUBLIC_V6.upper()}]/", True),
        (f"[{PUBLIC_V6}]:8080", f"http://[{PUBLIC_V6}]:8080/", True),
        ("pictures.example", "http://pictures.example:8080/", False),
        ("pictures.example:8080", "http://pictures.example:8080/", True),
        ("pictures.example:8080", "http://pictures.example/", False),
        ("pictures.example:80", "http://pictures.example/", True),
        ("pictures.example", "http://pictures.example:443/", False),
        ("*:8080", "http://pictures.example:8080/", True),
    ],
)
def test_what_an_entry_allows(
    allowed: str, url: str, fine: bool, dialled: Callable[[int], list[tuple[str, int]]]
) -> None:
    async def attempt() -> None:
        async with site({"/": answer()}) as listener:
            seen = dialled(listener.port)
            names = {f"{one}pictures.example": [PUBLIC] for one in ("", "a.", "a.b.", "not")}
            names["pictures.example.evil.example"] = [PUBLIC]
            if fine:
                assert await fetch(url, names, Policy((allowed,))) == PICTURE
            else:
                with raises(ImageError, "image.url-not-allowed"):
                    await fetch(url, names, Policy((allowed,)))
            assert len(seen) == listener.opened == int(fine)

    asyncio.run(attempt())


def test_nothing_is_fetched_by_default(reach: Reach) -> None:
    with raises(ImageError, "image.url-not-allowed"):
        asyncio.run(fetch("http://pictures.example/", policy=Policy()))
    assert reach.connected == []


@pytest.mark.parametrize("scheme", ["https", "http"])
def test_a_scheme_can_be_left_out(scheme: str) -> None:
    other = {"https": "http", "http": "https"}[scheme]
    with raises(ImageError, "image.url-invalid", scheme):
        asyncio.run(fetch(f"{other}://pictures.example/", policy=Policy(("*",), schemes=(scheme,))))


@pytest.mark.parametrize(
    "entry",
    ["", "*.", "**", "a.*.example", "http://a.example", "a.example/", "::1", "[::1", "a.example:",
     "a.example:0", "a.example:70000", "127.1", "0x7f.1", "a example", "bücher.example",
     "a.example.", "[fe80::1%lo]", "a@b.example", "[127.0.0.1]", "[:::]",
     "[::1]x"],
)  # fmt: skip
def test_an_entry_that_names_no_host(entry: str) -> None:
    with raises(OptionError, "option.wrong-value", repr(entry)):
        Policy((entry,))


@pytest.mark.parametrize(
    ("name", "value"),
    [("schemes", ("file",)), ("schemes", ()), ("max_bytes", 0), ("timeout", 0), ("timeout", -1.0),
     ("max_concurrent", 0), ("max_redirects", -1), ("timeout", float("nan"))],
)  # fmt: skip
def test_a_limit_without_a_meaning(name: str, value: Any) -> None:
    with raises(OptionError, "option.wrong-value", name):
        Policy(("*",), **{name: value})


@pytest.mark.parametrize("length", ["declared", "chunked", "until closed"])
@pytest.mark.parametrize("over", [0, 1])
def test_the_size_is_limited_while_it_arrives(
    length: str, over: int, dialled: Callable[[int], list[tuple[str, int]]]
) -> None:
    body = bytes(100_000 + over)
    start = b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\n"
    whole = {
        "declared": answer(body),
        "chunked": start
        + b"transfer-encoding: chunked\r\n\r\n"
        + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body),
        "until closed": b"HTTP/1.0 200 OK\r\ncontent-type: image/png\r\n\r\n" + body,
    }

    async def attempt() -> None:
        async with site({"/": whole[length]}) as listener:
            dialled(listener.port)
            policy = Policy(("*",), max_bytes=100_000)
            if not over:
                assert await fetch("http://pictures.example/", policy=policy) == body
                return
            with raises(ImageError, "image.too-large", "100,000"):
                await fetch("http://pictures.example/", policy=policy)

    asyncio.run(attempt())


def test_an_endless_body_is_cut_at_the_limit(
    dialled: Callable[[int], list[tuple[str, int]]],
) -> None:
    sent = 0

    async def endless(writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\n\r\n")
        while True:
            writer.write(bytes(65536))
            sent += 65536
            await writer.drain()

    async def attempt() -> None:
        async with site({"/": endless}) as listener:
            dialled(listener.port)
            with raises(ImageError, "image.too-large"):
                await fetch("http://pictures.example/", policy=Policy(("*",), max_bytes=1_000_000))

    asyncio.run(attempt())
    assert sent < 50_000_000  # what the buffers of the system hold, and no more


@pytest.mark.parametrize("where", ["connect", "head", "body", "resolve", "redirects"])
def test_the_time_is_limited_as_a_whole(
    where: str, dialled: Callable[[int], list[tuple[str, int]]]
) -> None:
    async def slow(writer: asyncio.StreamWriter) -> None:
        if where == "body":
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\n\r\n")
        for _ in range(1000):
            writer.write(b"x" if where == "body" else b"HTTP/1.1 100 Continue\r\n\r\n")
            await writer.drain()
            await asyncio.sleep(0.02)

    async def slow_redirect(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.15)
        writer.write(redirect("/redirects"))

    async def slow_resolver(host: str, port: int) -> Sequence[str]:
        if where == "resolve":
            await asyncio.sleep(60)
        return [PUBLIC]

    async def attempt() -> None:
        answers = {f"/{one}": slow for one in ("head", "body", "resolve")}
        async with site({**answers, "/redirects": slow_redirect}) as listener:
            dialled(listener.port)
            if where == "connect":
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(anyio, "connect_tcp", lambda **_: asyncio.sleep(60))
                    await expect(slow_resolver)
            else:
                await expect(slow_resolver)

    async def expect(resolve: Resolver) -> None:
        images = RemoteImages(Policy(("*",), timeout=0.3, max_redirects=99), resolver=resolve)
        began = asyncio.get_running_loop().time()
        with raises(ImageError, "image.url-too-slow", "0.3"):
            await images.fetch(f"http://pictures.example/{where}")
        assert asyncio.get_running_loop().time() - began < 10
        images.close()

    asyncio.run(attempt())


@pytest.mark.parametrize(
    ("kind", "fine"),
    [
        ("image/png", True),
        ("IMAGE/JPEG; charset=binary", True),
        ("image/vnd.microsoft.icon", True),
        ("application/octet-stream", True),
        ("binary/octet-stream", True),
        ("text/html", False),
        ("application/json", False),
        ("text/plain; image/png", False),
        ("image/svg+xml", False),
        ("image/", False),
        ("", False),
        ("multipart/x-mixed-replace", False),
    ],
)
def test_the_type_is_that_of_an_image(
    kind: str, fine: bool, dialled: Callable[[int], list[tuple[str, int]]]
) -> None:
    async def attempt() -> None:
        async with site({"/": answer(PICTURE, kind)}) as listener:
            dialled(listener.port)
            if fine:
                assert await fetch("http://pictures.example/") == PICTURE
                return
            with raises(ImageError, "image.url-no-image"):
                await fetch("http://pictures.example/")

    asyncio.run(attempt())


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "identity, gzip", "zstd"])
def test_a_compressed_answer_is_not_unpacked(
    coding: str, dialled: Callable[[int], list[tuple[str, int]]]
) -> None:
    bomb = gzip.compress(bytes(10_000_000))

    async def attempt() -> None:
        packed = answer(bomb, "image/png", f"content-encoding: {coding}")
        async with site({"/": packed}) as listener:
            dialled(listener.port)
            with raises(ImageError, "image.url-no-image", coding):
                await fetch("http://pictures.example/")

    asyncio.run(attempt())


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 206 Partial\r\ncontent-type: image/png\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 304 Not Modified\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\ncontent-length: 9\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\ncontent-length: nine\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\ntransfer-encoding: chunked\r\n\r\nx\r\n",
        b"SSH-2.0-OpenSSH_9.9\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x-a: " + b"a" * 200_000 + b"\r\n\r\n",
        b"",
    ],
)
def test_an_answer_that_is_none(
    raw: bytes, dialled: Callable[[int], list[tuple[str, int]]]
) -> None:
    async def attempt() -> None:
        async with site({"/": raw}) as listener:
            dialled(listener.port)
            with raises(ImageError, "image.not-fetched", "pictures.example"):
                await fetch("http://pictures.example/")

    asyncio.run(attempt())


def test_a_name_without_an_address() -> None:
    async def unknown(host: str, port: int) -> Sequence[str]:
        raise OSError(-2, "Name or service not known")

    async def empty(host: str, port: int) -> Sequence[str]:
        return []

    async def attempt(resolve: Resolver) -> None:
        await RemoteImages(Policy(("*",)), resolver=resolve).fetch("http://pictures.example/")

    for one in (unknown, empty):
        with raises(ImageError, "image.not-fetched", "pictures.example"):
            asyncio.run(attempt(one))


def test_the_system_resolves_where_no_other_does(reach: Reach) -> None:
    async def attempt() -> None:
        images = RemoteImages(Policy(("localhost",)))
        with raises(ImageError, "image.url-not-public"):
            await images.fetch("http://localhost/")
        images.close()

    asyncio.run(attempt())
    assert reach.asked == ["localhost"]
    assert reach.connected == []


@pytest.mark.parametrize("name", ["HTTP_PROXY", "ALL_PROXY", "HTTPS_PROXY"])
def test_proxies_are_not_used(
    name: str,
    dialled: Callable[[int], list[tuple[str, int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv(name.lower(), "http://127.0.0.1:9")

    async def attempt() -> None:
        async with site({"/": answer()}) as listener:
            seen = dialled(listener.port)
            assert await fetch("http://pictures.example/") == PICTURE
            assert seen == [(PUBLIC, 80)]

    asyncio.run(attempt())


def test_tls_verifies_the_name_and_not_the_address(
    dialled: Callable[[int], list[tuple[str, int]]],
) -> None:
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(TLS / "certificate.pem", TLS / "key.pem")
    asked: list[str | None] = []
    server.sni_callback = lambda _, name, __: asked.append(name)
    knows = ssl.create_default_context(cafile=str(TLS / "certificate.pem"))
    names = {"other.example": [PUBLIC]}

    async def attempt() -> None:
        answers = {"/": answer(), "/down": redirect("http://pictures.example/")}
        async with site(answers, server) as listener:
            seen = dialled(listener.port)
            assert await fetch("https://pictures.example/", tls=knows) == PICTURE
            assert (seen, asked) == ([(PUBLIC, 443)], ["pictures.example"])
            address = Policy((PUBLIC,))
            assert await fetch(f"https://{PUBLIC}/", policy=address, tls=knows) == PICTURE
            with raises(ImageError, "image.not-fetched", "other.example"):
                await fetch("https://other.example/", names, tls=knows)
            with raises(ImageError, "image.not-fetched", "certificate"):
                await fetch("https://pictures.example/")  # nobody vouches for this certificate
            assert len(listener.hits) == 2
            with raises(ImageError, "image.url-redirect", "https"):
                await fetch("https://pictures.example/down", tls=knows)

    asyncio.run(attempt())


def test_fetches_at_a_time_are_limited(dialled: Callable[[int], list[tuple[str, int]]]) -> None:
    running = most = 0

    async def counted(writer: asyncio.StreamWriter) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.02)
        running -= 1
        writer.write(answer())

    async def attempt() -> None:
        async with site({"/": counted}) as listener:
            dialled(listener.port)
            policy = Policy(("*",), max_concurrent=3)
            images = RemoteImages(policy, resolver=resolver({"pictures.example": [PUBLIC]}))
            found = await asyncio.gather(
                *(images.fetch("http://pictures.example/") for _ in range(12))
            )
            assert found == [PICTURE] * 12
            images.close()

    asyncio.run(attempt())
    assert most == 3


def test_a_fetch_that_is_given_up_closes_its_connection(
    dialled: Callable[[int], list[tuple[str, int]]],
) -> None:
    async def attempt() -> None:
        gone = asyncio.Event()

        async def waits(writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\n\r\n")
            while not writer.transport.is_closing():
                writer.write(b"x")
                await asyncio.sleep(0.01)
            gone.set()

        async with site({"/": waits}) as listener:
            dialled(listener.port)
            task = asyncio.create_task(fetch("http://pictures.example/"))
            while not listener.hits:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.wait_for(gone.wait(), 10)

    asyncio.run(attempt())


def test_what_is_public() -> None:
    for one in (PUBLIC, PUBLIC_TOO, PUBLIC_V6, "1.1.1.1", "8.8.8.8", "2a00:1450:4001::1"):
        address = parse_address(one)
        assert address is not None, one
        assert is_public(address), one
    for one in (
        "fe80::1%lo",
        "127.1",
        "0x7f.0.0.1",
        "01.1.1.1",
        "1.1.1.1.",
        "",
        "::1%",
        "\uff11.1.1.1",
    ):
        assert parse_address(one) is None, one


def test_a_url_does_not_break_the_lines_of_a_log() -> None:
    for policy in (Policy(), Policy(("*",))):
        with pytest.raises(ImageError) as caught:
            asyncio.run(fetch("http://a/\nINFO all is well", policy=policy))
        assert "\n" not in str(caught.value)
