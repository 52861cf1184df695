"""Open ONNX Runtime sessions on a named device, or raise an error that says why not.

Traps:
- ONNX Runtime falls back to the CPU silently when a device's libraries do not load: the providers
  of the open session are compared with the requested one.
- A graph is always opened by its path: from bytes, external data in the Hub's cache (symlinks)
  is refused.
- Memory patterns are off: ONNX Runtime would plan one for each length of the attention mask, so one
  for each token.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import (
    onnxruntime_pybind11_state as native,  # pyright: ignore[reportAttributeAccessIssue]
)

from vlmport import REPORTS_BY_CHOICE
from vlmport.errors import BundleError, DeviceError
from vlmport.files.foreign import check_file
from vlmport.runtime.decoding.options import whole_number
from vlmport.runtime.graphs.devices import CPU, HOST, INDEXED, Device, add_plugin

if not REPORTS_BY_CHOICE:  # for a program that imported ONNX Runtime before vlmport
    ort.disable_telemetry_events()

# ONNX Runtime's element types that a bundle may use.
DTYPES = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(double)": np.dtype(np.float64),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(int8)": np.dtype(np.int8),
    "tensor(bool)": np.dtype(np.bool_),
}

# ONNX Runtime's exceptions have no common base class; file system errors are RuntimeErrors.
ORT_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    MemoryError,
    *(
        value
        for value in vars(native).values()
        if isinstance(value, type) and issubclass(value, Exception)
    ),
)
OUT_OF_MEMORY = re.compile(
    r"bad_alloc|bad allocation|Failed to allocate memory|out of memory|ALLOC_FAILED", re.IGNORECASE
)

NO_FLASH = "ORT_GQA_DISABLE_FLASH_ATTENTION"
_kernel = threading.Condition()
_opening = {False: 0, True: 0}  # older kernel? → number of sessions that open with it now
_setting_variable = threading.Lock()

# The name of the node that failed, as graph/refusal.py writes it.
REFUSED = re.compile(r"Name:'(?:[^']*/)?refused: (?P<reason>.*?) \| (?P<hint>.*?)' Status Message")


def open_session(
    path: Path,
    device: Device = HOST,
    *,
    threads: int | None = None,
    low_memory: bool = False,
    older_attention: bool = False,
) -> ort.InferenceSession:
    """Open a graph by its path.

    Args:
        threads: maximum number of threads within an operator; None for all cores.
        low_memory: run the graph unoptimized, from its mapped weights, without a second copy of
            them: for a single pass. It is slow, and rounds in other places.
        older_attention: take the kernel of grouped-query attention that ONNX Runtime had before its
            flash kernel, on the CPU.

    Raises BundleError for a missing or corrupt graph or its data, DeviceError when the device
    did not come up, OptionError for a thread count below 1.
    """
    if threads is not None:
        threads = whole_number("threads", threads, 1)
    if not path.is_file():
        raise BundleError(
            f"{path}: missing",
            hint="download or export the bundle again",
            code="bundle.missing-file",
        )
    check_file(path, BundleError, hint="download or export the bundle again", what="the graph")
    options = _session_options(threads, low_memory)
    providers: dict[str, Any] = {"providers": _providers(device)}
    if device.plugin is not None:
        add_plugin(options, device, threads)
        providers = {}  # the options name it
    try:
        with _attention_kernel(older=older_attention):
            session = ort.InferenceSession(path, options, enable_fallback=0, **providers)
    except ORT_ERRORS as error:
        raise _open_error(path, device, error) from error
    if session.get_providers()[0] != device.provider:
        raise DeviceError(
            f"{path.name}: asked for {device}, ONNX Runtime took {session.get_providers()[0]}",
            hint="check the versions of its libraries (CUDA and cuDNN), or use --device cpu",
            code="device.failed",
        )
    return session


@contextlib.contextmanager
def _attention_kernel(*, older: bool) -> Iterator[None]:
    """Choose the kernel of grouped-query attention for the session that opens within.

    ONNX Runtime reads the variable of the process when a session opens. So while one opens with
    the older kernel, the others wait; those without it may open at the same time.
    """
    with _kernel:
        _kernel.wait_for(lambda: not _opening[not older])
        _opening[older] += 1
    try:
        with _older_kernel() if older else contextlib.nullcontext():
            yield
    finally:
        with _kernel:
            _opening[older] -= 1
            _kernel.notify_all()


@contextlib.contextmanager
def _older_kernel() -> Iterator[None]:
    """Set the variable of the process, for one session at a time."""
    with _setting_variable:
        before = os.environ.get(NO_FLASH)
        os.environ[NO_FLASH] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ[NO_FLASH]
            else:
                os.environ[NO_FLASH] = before


def _session_options(threads: int | None, low_memory: bool) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors are exceptions; don't repeat them on stderr
    options.enable_mem_pattern = False
    if threads is not None:
        options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    if low_memory:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False
    return options


def return_freed_memory() -> None:
    """Return the memory of closed sessions to the system: glibc keeps most of it otherwise.

    It kept 700 MB of a tower of 758 MB. Other allocators need nothing.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _providers(device: Device) -> list[str | tuple[str, dict[str, str]]]:
    """The device's provider, and the CPU for the few nodes (shapes) that belong there."""
    if device.provider == CPU:
        return [CPU]
    if device.name in INDEXED:
        return [(device.provider, {"device_id": str(device.index)}), CPU]
    return [device.provider, CPU]


def _open_error(path: Path, device: Device, error: Exception) -> BundleError | DeviceError:
    detail = first_line(error)
    if device.plugin is not None:
        return DeviceError(
            f"{path.name} on {device}: {detail}",
            hint="run this component on the CPU, or at another precision",
            code="device.failed",
        )
    if device.provider != CPU and device.provider.removesuffix("ExecutionProvider") in detail:
        return DeviceError(
            f"{path.name} on {device}: {detail}", hint="use --device cpu", code="device.failed"
        )
    if "external data" in detail.lower() or "external initializer" in detail.lower():
        return BundleError(
            f"{path}: its external data is missing or does not fit: {detail}",
            hint="download or export the bundle again",
            code="bundle.missing-file",
        )
    return BundleError(
        f"{path}: ONNX Runtime can't open it: {detail}",
        hint="download or export the bundle again",
        code="graph.not-opened",
    )


def is_out_of_memory(error: Exception) -> bool:
    """Whether numpy, ONNX Runtime or a GPU ran out of memory."""
    return isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)) is not None


def first_line(error: Exception) -> str:
    """Return the first line of ONNX Runtime's message, without its error code."""
    text = str(error).strip().split("\n")[0]
    return text.removeprefix("[ONNXRuntimeError] : ")[:400]


def refusal(error: Exception) -> tuple[str, str] | None:
    """Return the reason and the hint of a graph that refuses its input; None for other errors."""
    found = REFUSED.search(str(error))
    return None if found is None else (found["reason"], found["hint"])
