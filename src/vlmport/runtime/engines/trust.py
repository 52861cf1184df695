"""Test engines before components are trusted to them, and keep what passed.

ONNX Runtime's CPU kernels are what a bundle is verified with. Any other engine is compared with
them first (probing.py), in a process of its own: an engine that crashes does not take the user's
program with it. A component that an engine computes wrongly is refused by name.

Verdicts of components that passed are kept in `$VLMPORT_CACHE/engines`, one file each, named by a
digest of all that they depend on: the machine, the versions, the graph and its weights. Deleting
any of them loses nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort

from vlmport import __version__
from vlmport.bundle.cache import cache_folder
from vlmport.errors import DeviceError
from vlmport.runtime.engines.machine import environment, machine_key
from vlmport.runtime.graphs.base import BundleGraphs
from vlmport.runtime.graphs.devices import HOST

# Modules are found where this process finds them, and never in the working folder.
PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from vlmport.runtime.engines.probing import main; main()"
)
SECONDS = 900  # a probe that takes longer has hung
WHOLE = "golden"  # in the place of a component: the whole bundle against its recorded results
PROBE = 2  # raise it when the probe finds more than before
LARGEST = 1 << 16  # bytes of a kept verdict


def trust(graphs: BundleGraphs) -> None:
    """Test each component that does not run on ONNX Runtime's CPU kernels, unless it has passed.

    Where the bundle has recorded results, all components are tested together too: each of them may
    be right to within its tolerance, and the whole is not.

    Raises DeviceError where an engine computes a component wrongly, or crashes.
    """
    if not (names := foreign(graphs)):
        return
    records = {name: _record(graphs, [name]) for name in names}
    if graphs.manifest.golden.expected.get(graphs.precision) is not None:
        records[WHOLE] = _record(graphs, list(graphs.choice))
    if not (untried := [name for name, record in records.items() if not _has_passed(record)]):
        return
    verdicts = run_probe(graphs, [name for name in untried if name != WHOLE])
    if bad := [one for one in verdicts if one["problem"] is not None]:
        raise _refusal(graphs, bad)
    for one in verdicts:
        if one["component"] in records:
            _keep(records[one["component"]], one)


def foreign(graphs: BundleGraphs) -> list[str]:
    """List the components that do not run on ONNX Runtime's CPU kernels."""
    return [name for name, device in graphs.engines.items() if device != HOST]


def run_probe(graphs: BundleGraphs, components: Sequence[str]) -> list[dict[str, Any]]:
    """Compare components with the CPU, in a process of its own; return a verdict for each.

    Last comes a verdict on the whole bundle, where it has recorded results and the others are good.

    A crash is a verdict too: of the component that was running, and nothing is said of later ones.

    Raises DeviceError where the process failed before any component began.
    """
    request = {
        "folder": str(graphs.bundle.folder.absolute()),
        "choice": dict(graphs.choice),
        "engines": {name: str(device) for name, device in graphs.engines.items()},
        "threads": graphs.threads,
        "components": list(components),
    }
    try:
        done = subprocess.run(
            _command(),
            input=json.dumps(request),
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=SECONDS,
            check=False,
        )
        output, ended = done.stdout, _end_of(done.returncode)
        said = done.stderr.strip().rpartition("\n")[2][:300]
    except subprocess.TimeoutExpired as error:
        raw = error.stdout or b""
        output = raw if isinstance(raw, str) else raw.decode("utf-8", "replace")
        ended, said = f"had not ended after {SECONDS} seconds", ""
    except OSError as error:
        raise DeviceError(
            f"the process that tests {graphs.device} can't be started: {error}",
            hint="run on the CPU (--device cpu)",
            code="device.probe-failed",
        ) from error
    return _verdicts(graphs, output, f"{ended}{': ' if said else ''}{said}")


def _command() -> list[str]:
    """Return the command that starts the probe. A frozen program would start itself."""
    name = Path(sys.executable or "").name.lower()
    if getattr(sys, "frozen", False) or not name.startswith(("python", "pypy")):
        raise OSError(f"it needs a Python, and this program is {name or 'none'}")
    paths = [str(Path(one).absolute()) for one in sys.path if one]
    return [sys.executable, "-I", "-c", PROGRAM, json.dumps(paths)]


def _verdicts(graphs: BundleGraphs, output: str, ended: str) -> list[dict[str, Any]]:
    """Read the lines of the process."""
    found: list[dict[str, Any]] = []
    running, done = None, False
    for line in output.splitlines():
        try:
            one = json.loads(line)
        except ValueError:
            break  # the last line of a process that was killed
        if "begins" in one:
            running = one["begins"]
        elif "problem" in one:
            found.append(one)
            running = None
        done = done or "done" in one
    if done:
        return found
    if running is None:
        raise DeviceError(
            f"the process that tests {graphs.device} {ended}",
            hint="run on the CPU (--device cpu); `vlmport inspect --probe` tests the bundle itself",
            code="device.probe-failed",
        )
    problem = f"the engine {ended}"
    engine = graphs.engines.get(running, graphs.device)
    return [*found, {"component": running, "engine": str(engine), "problem": problem}]


def _end_of(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"crashed ({signal.Signals(-code).name})"
    return f"ended with exit code {code}"


def _refusal(graphs: BundleGraphs, bad: Sequence[Mapping[str, Any]]) -> DeviceError:
    """Name each component that failed, and the components that may still run there."""
    said = "; ".join(f"{one['component']} on {one['engine']}: {one['problem']}" for one in bad)
    wrong = {one["component"] for one in bad}
    left = [f"{one}={graphs.engines[one]}" for one in foreign(graphs) if one not in wrong]
    if not left or not wrong <= set(graphs.engines):
        left = ["cpu"]
    return DeviceError(
        f"the engine does not compute as the CPU does: {said}",
        hint=f"--device {','.join(left)}",
        code="device.wrong-numbers",
    )


def _record(graphs: BundleGraphs, components: Sequence[str]) -> Path:
    """The file of a component's verdict, or of the whole bundle's, named by what it depends on."""
    bundle, files, plugins = graphs.bundle, [], {}
    for component in components:
        variant = bundle.variant(component, graphs.choice[component])
        for name in (variant.model, *variant.data):
            found = bundle.path(name).stat()
            listed = bundle.manifest.files[name].sha256
            files.append([name, listed, found.st_size, found.st_mtime_ns])
        if (plugin := graphs.engines[component].plugin) is not None:
            plugins[plugin.package] = plugin.version()
    depends = {
        "probe": [PROBE, __version__],
        "machine": machine_key(),
        "versions": [ort.__version__, plugins],
        "providers": {name: str(graphs.engines[name]) for name in components},
        "environment": environment(),
        "threads": graphs.threads,
        "files": files,
    }
    digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
    name = components[0] if len(components) == 1 else WHOLE
    return cache_folder().parent / "engines" / f"{name}-{digest[:32]}.json"


def _has_passed(record: Path) -> bool:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if record.stat().st_size <= LARGEST:
            kept = json.loads(record.read_text(encoding="utf-8"))
            return isinstance(kept, dict) and kept.get("problem", "") is None
    return False


def _keep(record: Path, verdict: Mapping[str, Any]) -> None:
    """Save a verdict; a cache that can't be written only costs the time of the next probe."""
    with contextlib.suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=record.parent, suffix=".partial")
        try:
            with open(handle, "w", encoding="utf-8") as file:
                json.dump(dict(verdict), file)
            os.replace(partial, record)
        except OSError:
            os.unlink(partial)
            raise
