"""The sessions of one bundle: what the graphs of all layouts have in common.

Traps:
- Some kernels give zeros for a token id without an embedding, and some count a negative id from the
  end: ids are checked before they reach a graph.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import onnxruntime as ort

from vlmport.bundle import Bundle, Manifest
from vlmport.bundle.precisions import precision_name
from vlmport.errors import PromptError, TokenizerError
from vlmport.files.onnx_bytes import table_rows
from vlmport.runtime.decoding.options import whole_number
from vlmport.runtime.graphs.devices import (
    IMAGE,
    POSITIONS,
    Engines,
    choose_forms,
    engines_name,
    parse_engines,
)
from vlmport.runtime.graphs.sessions import open_session
from vlmport.text.tokenizer import read_tokenizer

if TYPE_CHECKING:
    from jaxtyping import Int

__all__ = ["IMAGE", "POSITIONS", "BundleGraphs"]


class BundleGraphs:
    """The graphs of a bundle at chosen precisions on chosen engines. Threads may share it.

    Attributes:
        layout: the name of the layout that the class runs.
        choice: component → precision.
        engines: component → device.
        older_attention: whether to take ONNX Runtime's older kernel of grouped-query attention on
            the CPU. Results differ in the last bits.
    """

    layout: ClassVar[str]

    def __init__(
        self,
        bundle: Bundle,
        choice: Mapping[str, str],
        engines: Engines,
        threads: int | None = None,
        *,
        older_attention: bool = False,
    ):
        self.bundle, self.choice, self.engines, self.threads = bundle, choice, engines, threads
        self.older_attention = older_attention
        self._sessions: dict[str, ort.InferenceSession] = {}
        self._opening = threading.RLock()  # so that two threads don't open the same graph
        self._rows: dict[str, int] = {}  # of the embedding table in a component

    @classmethod
    def open(
        cls,
        bundle: Bundle | str | Path,
        *,
        precision: str = "auto",
        device: str = "cpu",
        threads: int | None = None,
        older_attention: bool = False,
    ) -> Self:
        """Choose the graphs; sessions open at first use, each with up to `threads` threads.

        Args:
            device: one for all components that may choose, or a mix such as 'vision=openvino'.

        Raises BundleError for a bad bundle, another layout or a missing precision, DeviceError for
        a device that is not available here or a component that may not choose, OptionError for a
        thread count below 1.
        """
        if threads is not None:
            threads = whole_number("threads", threads, 1)
        bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        bundle.needs_layout(cls.layout)
        engines = parse_engines(device, bundle.manifest.components)
        choice = choose_forms(bundle.manifest, precision, engines)
        return cls(bundle, choice, engines, threads, older_attention=older_attention)

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    @property
    def precision(self) -> str:
        """One name where all components share it, else 'component=precision,…'."""
        return precision_name(self.choice)

    @property
    def device(self) -> str:
        """One name where all components that may choose share it, else 'component=device,…'."""
        return engines_name(self.engines)

    @property
    def opened(self) -> tuple[str, ...]:
        """The components whose sessions are open."""
        return tuple(self._sessions)

    def path(self, component: str) -> Path:
        """The file of a component's graph at the chosen precision."""
        return self.bundle.path(self.bundle.variant(component, self.choice[component]).model)

    def session(self, component: str) -> ort.InferenceSession:
        """The session of a component, opened at first use; preprocessing is always on the CPU."""
        if (found := self._sessions.get(component)) is not None:
            return found
        with self._opening:
            if (found := self._sessions.get(component)) is None:
                found = open_session(
                    self.path(component),
                    self.engines[component],
                    threads=self.threads,
                    older_attention=self.older_attention,
                )
                self._sessions[component] = found
            return found

    def release(self, component: str) -> None:
        """Release one session. A later call opens it again."""
        self._sessions.pop(component, None)

    def close(self) -> None:
        """Release all sessions. A later call opens them again."""
        self._sessions.clear()

    def checked(self, ids: Int[np.ndarray, ...], component: str) -> Int[np.ndarray, ...]:
        """Return the ids as a graph takes them. Raises PromptError for one without an embedding.

        Args:
            component: the graph that looks the ids up.
        """
        ids = np.ascontiguousarray(ids, np.int64)
        rows = self.embedding_rows(component)
        if not ids.size or (ids.min() >= 0 and ids.max() < rows):
            return ids
        wrong = ids[(ids < 0) | (ids >= rows)].reshape(-1)
        first = int(wrong[0])
        raise PromptError(
            f"token {first}{self._text_of(first)} is past the embedding, which has {rows} rows; "
            f"{len(wrong)} of {ids.size} tokens are",
            hint="leave this token out; the tokenizer knows more tokens than the model",
            code="prompt.token-past-embedding",
        )

    def embedding_rows(self, component: str) -> int:
        """Return the number of ids that have an embedding, which the graph's table says.

        For a graph that looks up something other than its input, it is the number that the manifest
        needs. The head may give scores for more tokens, or fewer.

        Raises BundleError for a file that is not ONNX.
        """
        if component not in self._rows:
            rows = table_rows(self.path(component), "input_ids")
            if rows is None:
                dims, prompt = self.manifest.dims, self.manifest.prompt
                rows = max(dims.vocab_size, prompt.image_token_id + 1)
            self._rows[component] = rows
        return self._rows[component]

    def _text_of(self, token: int) -> str:
        """A token's text in brackets, if the tokenizer knows it."""
        try:
            known = 0 <= token < 2**32  # the library takes no other
            text = read_tokenizer(self.bundle.folder).id_to_token(token) if known else None
        except TokenizerError:
            text = None
        return "" if text is None else f" ({text[:80]!r})"
