"""The command line, fuzzed: arguments × surroundings, each in a forked child.

Whatever is typed, whatever the streams and the files are, and whenever a signal comes: an exit code
that means something, a few lines on stderr, no traceback and no hang.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hypothesis import strategies as st

from tests.forked import SIGNALS, STREAMS, Case, run_case
from tests.fuzz.workshop import Workshop

CODES = {0, 1, 2, 129, 130, 143}
LINES = 6  # a usage error has four; a message, its hint and a warning or two. Images have their own
CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")

OPTIONS = (
    *("--json", "--stream", "--precision", "-p", "--device", "--threads", "--max-new-tokens"),
    *("--num-beams", "--do-sample", "--seed", "--temperature", "--top-k", "--stop-string"),
    *("--option", "--image-option", "--adapter", "--revision", "--system"),
    *("--json-schema", "--regex", "--logprobs", "--probe", "--layout", "--image-size", "--force"),
    *("--max-shard-size", "--limit", "--metric", "--captions", "--tokens", "--rounds", "--help"),
    *("--ignore-weights", "--verify-hashes", "--drop-oldest", "--image", "--port"),
)
VALUES = (
    *("", "0", "1", "2", "-1", "1e999", "nan", "9" * 5000, "0x10", "true", "null", "[", "{}"),
    *("fp32", "q4", "fp99", "vision=q8,decoder=q4", "=", ",", "cpu", "cuda:99", "cpu:x", "2GB"),
    *("max_length=3", "max_length=1e400", "a=[[[", "x" * 300, "é猫", "\x1b]0;x\x07", "\udcff", "~"),
    *("..", "/", "/dev/null", "/dev/full", "/dev/zero", "~nobody/x", "a/b/c/d", "org/name", "-"),
    *("(a+)+$", "a\nb", "64x64", "0x0", "99999999x1", "hub", "genai", "exact-match", "\u202e"),
)


def odd_files(folder: Path) -> list[str]:
    """Names of files of every kind, and of some that are not there."""
    folder.mkdir(exist_ok=True)
    made: dict[str, bytes] = {
        "empty": b"", "text.txt": b"hello\n", "page.html": b"<!doctype html><html></html>",
        "zeros.onnx": bytes(100), "list.json": b"[1]", "deep.json": b"[" * 100_000,
        "odd.json": b'{"a": 1e999, "b": "\\ud800"}', "lfs": b"version https://git-lfs\n",
    }  # fmt: skip
    for name, data in made.items():
        (folder / name).write_bytes(data)
    for name in ("folder", "unreadable"):
        (folder / name).mkdir(exist_ok=True)
    for name, target in (("loop", "loop"), ("dangling", "nothing")):
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(target)
    if not (folder / "pipe").exists():
        os.mkfifo(folder / "pipe")
    (folder / "folder" / "config.json").write_bytes(made["odd.json"])
    (folder / "forbidden.png").write_bytes(b"x")
    (folder / "forbidden.png").chmod(0)
    (folder / "unreadable").chmod(0)
    names = [*made, "folder", "unreadable", "loop", "dangling", "forbidden.png", "none", "n" * 300]
    return [str(folder / name) for name in names]


@st.composite
def bad_bundles(draw: st.DrawFn, shop: Workshop) -> str:
    """A copy of a bundle with one value of its manifest replaced, or one file."""
    copied = shop.folder / "bad-bundle"
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(bundle_of(shop), copied, copy_function=os.link)
    kind = draw(st.sampled_from(("manifest", "file")))
    if kind == "file":
        names = sorted(path for path in copied.rglob("*") if path.is_file())
        path = draw(st.sampled_from(names))
        path.unlink()
        how = draw(st.sampled_from(("gone", "empty", "folder", "link", "loop")))
        if how == "empty":
            path.write_bytes(b"")
        elif how == "folder":
            path.mkdir()
        elif how != "gone":
            path.symlink_to(path.name if how == "loop" else "/dev/zero")
        return str(copied)
    manifest = json.loads((copied / "vlmport.json").read_bytes())
    place = manifest
    while isinstance(place, dict | list) and place:
        key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        inner = place[key]  # pyright: ignore[reportArgumentType, reportCallIssue]
        if not isinstance(inner, dict | list) or not inner or draw(st.integers(0, 3)) == 0:
            odd = (None, -1, 0, 1.5, 10**30, "x", "", [], {}, True, "\x1b]0;", "../x", "\ud800")
            place[key] = draw(st.sampled_from(odd))  # pyright: ignore
            break
        place = inner
    (copied / "vlmport.json").unlink()
    (copied / "vlmport.json").write_text(json.dumps(manifest), encoding="utf-8")
    return str(copied)


def bundle_of(shop: Workshop) -> Path:
    """A bundle that a child has exported: this process may have no threads, for it forks."""
    out = shop.folder / "bundle"
    if not out.exists():
        shop.folder.chmod(0o755)
        made = run_case(Case(["export", str(shop.checkpoint()), str(out)]), seconds=300)
        assert made.code == 0, made.err
    return out


def cases(shop: Workshop) -> st.SearchStrategy[Case]:
    """A command line and its surroundings."""
    from PIL import Image

    picture, bundle = shop.folder / "picture é.png", str(bundle_of(shop))
    if not picture.exists():
        Image.new("RGB", (40, 30), "red").save(picture)
    files = [str(picture), bundle, str(shop.checkpoint()), *odd_files(shop.folder / "odd")]
    words = st.one_of(st.sampled_from(files), st.sampled_from(VALUES), bad_bundles(shop))
    out = str(shop.folder / "out")
    commands: dict[str, Callable[[st.DrawFn], list[str]]] = {
        "caption": lambda draw: ["-m", bundle, str(picture)],
        "ask": lambda draw: ["-m", bundle, str(picture)],
        "chat": lambda draw: ["-m", bundle],
        "export": lambda draw: [str(shop.checkpoint()), out, "-p", "fp32", "--force"],
        "inspect": lambda draw: [draw(st.sampled_from((bundle, f"{bundle}/onnx")))],
        "models": lambda draw: [],
        "eval": lambda draw: [bundle, str(shop.folder), "--no-record"],
        "bench": lambda draw: [bundle, "--no-cold", "--rounds", "1", "--new-tokens", "2"],
        "verify": lambda draw: [bundle, "--reference", str(shop.checkpoint()), "-p", "fp32"],
        "demo": lambda draw: ["-m", bundle, "--port", "0"],  # a signal ends it
    }

    @st.composite
    def drawn(draw: st.DrawFn) -> Case:
        name = draw(st.sampled_from(sorted(commands)))
        arguments = commands[name](draw)
        for _ in range(draw(st.integers(0, 2))):
            place = draw(st.integers(0, len(arguments)))
            if arguments and draw(st.booleans()):
                arguments[min(place, len(arguments) - 1)] = draw(words)
            else:
                more = [draw(st.sampled_from(OPTIONS)), draw(words)]
                arguments[place:place] = more[: draw(st.integers(1, 2))]
        clean = [one.replace("\0", "") for one in (name, *arguments)]
        interrupted = name == "demo" or draw(st.integers(0, 5)) == 0
        unlucky = draw(st.integers(0, 2)) == 0
        return Case(
            clean,
            stdout=draw(st.sampled_from(STREAMS)) if unlucky else "kept",
            stderr=draw(st.sampled_from(STREAMS)) if draw(st.integers(0, 5)) == 0 else "kept",
            stdin=draw(st.sampled_from(("", "What?\n/image x\n/reset\n", "é\udcff\n", None))),
            encoding=draw(st.sampled_from(("utf-8", "ascii", "cp1252", "utf-16"))),
            environment={"VLMPORT_CACHE": str(shop.folder / "cache"), "HF_HUB_OFFLINE": "1"},
            signal=draw(st.sampled_from(SIGNALS)) if interrupted else None,
            after=draw(st.sampled_from((0.0, 0.01, 0.05, 0.2, 0.5))),
            lean=draw(st.sampled_from((0, 100, 50_000))) if draw(st.integers(0, 9)) == 0 else None,
        )

    return drawn()


def visible(err: str) -> list[str]:
    """Return the lines that a person sees; a progress bar that erased itself leaves none."""
    return [line for line in CONTROL.sub("", err).splitlines() if line.strip()]


def run_command(shop: Workshop, case: Case) -> None:
    """Fork and look at what came."""
    result = run_case(case)
    # UTF-16 is read as UTF-8: a NUL is half of each character.
    result = replace(result, err=result.err.replace("\0", ""))
    told = f"{case}\n{result.code}\n{result.err[-3000:]}"
    assert result.code is not None, f"no end: {told}"
    killed = result.code < 0 and case.signal == -result.code  # before main() was there to hear it
    assert result.code in CODES or killed, told
    assert "Traceback" not in result.err, told
    assert "error[program.defect]" not in result.err, told
    assert len(visible(result.err)) <= LINES + 2 * result.err.count("error[image."), told
    assert len(result.err) < 5000, told
    left = [path.name for path in shop.folder.iterdir() if ".partial-" in path.name]
    assert not left, f"left over: {left}, {told}"
