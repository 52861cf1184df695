"""The key-value cache: rows of preallocated buffers that the decoder writes in place.

Past and present are the same memory, bound once for each number of rows. A prompt is run one row
at a time through views of its row (GroupQueryAttention takes several new tokens after a past only
at one row); then all rows step together, each at its own length. Where a decoder scales activations
by all rows of a call, rows also step one by one, so that no text depends on its neighbours.

Traps:
- ONNX Runtime's `get_outputs()` is in binding order: outputs are written into our own buffers and
  read there.
- The buffers are in the host's memory. On another device ONNX Runtime copies them both ways in each
  run: correct, but slow.
- Bindings of older versions hold addresses, not arrays: the bound arrays are kept here.
- Only a row's length counts: the buffer past it is never read. So a step may be run again, and a
  row may be cut back by setting its length.
- Rows are copied only over rows that nobody continues, so that an interrupted `reorder` can be
  repeated.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

from vlmport.errors import BundleError, DeviceError, PromptError
from vlmport.runtime.graphs.decoder import Decoder
from vlmport.runtime.graphs.sessions import ORT_ERRORS, first_line, is_out_of_memory

if TYPE_CHECKING:
    from jaxtyping import Float, Float32, Int64

to_ort = ort.OrtValue.ortvalue_from_numpy  # shares the array's memory

# Number of a prompt's tokens that a decoder on the CPU reads in one call: the time of
# GroupQueryAttention grows with the square of it. 876 tokens take 0.8 of the time at q4, 0.6 at q8.
CHUNK = 192
MASKS_AHEAD = 32


def prompt_cuts(S: int) -> list[int]:
    """Return the starts of the chunks of a prompt of S tokens on the CPU, and S."""
    return [*range(0, max(1, S - CHUNK // 2), CHUNK), S]


@dataclass(frozen=True)
class _BoundStep:
    """The binding of a step of one token for each of some rows, and the arrays that it uses."""

    binding: ort.IOBinding
    feeds: dict[str, np.ndarray]
    mask: Int64[np.ndarray, " B*capacity"]
    masks: dict[int, ort.OrtValue]  # by total: the first B * total values as i64[B, total]
    logits: Float[np.ndarray, "B V"]

    def masks_from(self, total: int) -> None:
        """Make the masks of this total and the next few. One by one they take far longer, because
        the decoder empties the processor's caches in between."""
        B, capacity = len(self.logits), len(self.mask) // len(self.logits)
        self.masks.clear()
        for n in range(total, min(total + MASKS_AHEAD, capacity + 1)):
            self.masks[n] = to_ort(self.mask[: B * n].reshape(B, n))


@dataclass(frozen=True)
class SavedRow:
    """A copy of a row: keys and values of its first `length` tokens, [K, length, head_dim]."""

    length: int
    rope_delta: int
    tensors: tuple[np.ndarray, ...]

    def first(self, length: int) -> SavedRow:
        """Return its first tokens, as views of the same memory."""
        return SavedRow(length, self.rope_delta, tuple(one[:, :length] for one in self.tensors))


class KeyValueCache:
    """`rows` sequences of up to `limit` tokens; buffers start at `capacity` and grow.

    Attributes:
        lengths: the number of valid tokens of each row. May be set to cut rows back.
        rope_deltas: for each row, the next position minus its length (0 except for models whose
            images take fewer positions than tokens).
        on_host: whether the decoder runs on the CPU, where the buffers are.
    """

    def __init__(self, decoder: Decoder, rows: int, capacity: int, limit: int):
        self.decoder = decoder
        self.limit = limit
        self.capacity = min(capacity, limit)
        self.lengths = [0] * rows
        self.rope_deltas = [0] * rows
        self.buffers = [port.empty(rows, self.capacity) for port in decoder.ports]
        self.on_host = decoder.on_host
        self._in_float32 = decoder.logits_dtype == np.float32
        self._steps: dict[tuple[int, int], _BoundStep] = {}  # by first row and number

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers; the system uses memory only for the pages that were written."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def reserve(self, length: int) -> None:
        """Make room for rows of `length` tokens. Raises PromptError beyond `limit`."""
        if length > self.limit:
            raise PromptError(
                f"the prompt has {length} tokens, the model's context is {self.limit}",
                hint="use fewer or smaller images, or a shorter prompt",
                code="prompt.too-long",
            )
        if length > self.capacity:
            self._grow(self.rows, min(self.limit, max(length, 2 * self.capacity)))

    def reserve_rows(self, rows: int) -> None:
        """Make room for a number of rows. Memory that was never written costs nothing."""
        if rows > self.rows:
            self._grow(max(rows, 2 * self.rows), self.capacity)

    def _grow(self, rows: int, capacity: int) -> None:
        """Replace the buffers by larger ones with the same contents."""
        used, old = max(self.lengths, default=0), self.rows
        capacity = max(capacity, used)
        self._steps.clear()
        self.capacity = 0  # until all have one size: after an interrupt the next call grows them
        for i, port in enumerate(self.decoder.ports):
            grown = port.empty(rows, capacity)
            grown[:old, :, :used] = self.buffers[i][:old, :, :used]
            self.buffers[i] = grown
        self.capacity = capacity
        # Lengths last: they give the number of rows, so an interrupted call is done again.
        self.rope_deltas = self.rope_deltas[:old] + [0] * (rows - old)
        self.lengths = self.lengths + [0] * (rows - old)

    def reorder(
        self, sources: Sequence[int], shared: Callable[[int, int], int] = lambda a, b: 0
    ) -> list[int]:
        """Make the rows 0 … len(sources)-1 continue the rows `sources`, in any order.

        A row that continues in its place is not copied.

        Args:
            shared: the number of tokens that two rows have in common at their start; these are not
                copied.

        Returns:
            The row of each continuation. All of 0 … len(sources)-1 occur.
        """
        B = len(sources)
        self.reserve_rows(B)
        placed: list[int | None] = [None] * B
        free = set(range(B))
        for i, source in enumerate(sources):
            if source in free:
                placed[i] = source
                free.remove(source)
        for i, source in enumerate(sources):
            if placed[i] is None:
                shared_prefix = {target: shared(source, target) for target in sorted(free)}
                target = max(shared_prefix, key=shared_prefix.__getitem__)
                self.copy_row(source, target, min(shared_prefix[target], self.lengths[target]))
                placed[i] = target
                free.remove(target)
        return [row for row in placed if row is not None]

    def copy_row(self, source: int, target: int, start: int = 0) -> None:
        """Copy row `source` to row `target`; the first `start` tokens are equal already."""
        used = self.lengths[source]
        self.lengths[target] = start  # still true if the copy is interrupted
        for buffer in self.buffers:
            buffer[target, :, start:used] = buffer[source, :, start:used]
        self.rope_deltas[target] = self.rope_deltas[source]
        self.lengths[target] = used

    def save(self, row: int) -> SavedRow:
        """Copy a row, for use after this cache."""
        used = self.lengths[row]
        return SavedRow(
            used,
            self.rope_deltas[row],
            tuple(buffer[row, :, :used].copy() for buffer in self.buffers),
        )

    def restore(self, row: int, saved: SavedRow) -> None:
        """Write a saved row back. Raises PromptError beyond the context."""
        self.reserve(saved.length)
        for buffer, tensor in zip(self.buffers, saved.tensors, strict=True):
            buffer[row, :, : saved.length] = tensor
        self.lengths[row], self.rope_deltas[row] = saved.length, saved.rope_delta

    def prefill(
        self,
        row: int,
        embeds: Float[np.ndarray, "S D"],
        positions: Int64[np.ndarray, "... S"] | None = None,
        *,
        keep: int = 1,
    ) -> Float32[np.ndarray, "n V"]:
        """Append S tokens to one row and return the logits of the last `keep` (0: of all).

        On the CPU a long prompt is read in chunks, unless more logits are asked for than the last
        chunk surely has. A decoder that scales activations by all rows of a call then scales them
        by chunk: the last bits differ from those of one call, and are as near to float32's.

        Args:
            positions: the tokens' positions; None counts on from the row's length and rope_delta.

        Raises PromptError beyond the context, before anything runs.
        """
        S, past = len(embeds), self.lengths[row]
        self.reserve(past + S)
        if positions is None:
            positions = np.arange(past, past + S) + self.rope_deltas[row]
        assert positions is not None
        logits = np.empty((1, 0, 0), np.float32)
        for start, stop in itertools.pairwise(self.cuts(S, keep)):
            part = slice(start, stop)
            logits = self._append(row, past + start, embeds[part], positions[..., part], keep)
        self.lengths[row] = past + S
        return logits[0, -keep:].astype(np.float32, copy=False)

    def cuts(self, S: int, keep: int = 1) -> list[int]:
        """Return the starts of a prompt's chunks, and S; the last has at least half a CHUNK."""
        # On another device each call copies the cache.
        if not self.on_host or not 0 < keep <= CHUNK // 2:
            return [0, S]
        return prompt_cuts(S)

    def _append(
        self,
        row: int,
        past: int,
        embeds: Float[np.ndarray, "S D"],
        positions: Int64[np.ndarray, "... S"],
        keep: int,
    ) -> Float[np.ndarray, "1 n V"]:
        """Call the decoder once, for S tokens after `past`."""
        S = len(embeds)
        keeps = "num_logits_to_keep" in self.decoder.inputs
        kept = keep if keep and keeps else S
        logits = np.empty((1, kept, self.decoder.vocab_size), self.decoder.logits_dtype)
        feeds = {
            "inputs_embeds": np.ascontiguousarray(embeds[None]),
            "attention_mask": np.ones((1, past + S), np.int64),
            "position_ids": self._with_batch(positions, (1, S)),
            "num_logits_to_keep": np.array(kept, np.int64),
        }
        views = [buffer[row : row + 1] for buffer in self.buffers]
        self._run(self._bind(feeds, views, logits))
        return logits

    def step(self, embeds: Float[np.ndarray, "B 1 D"]) -> Float32[np.ndarray, "B V"]:
        """Append one token to each of the first B rows and return their logits.

        The logits may be a view that the next step overwrites. Rows past B do not change.
        Raises PromptError where a row is at the end of the context, before anything runs.
        """
        B = len(embeds)
        self.reserve(max(self.lengths[:B]) + 1)
        if B == 1 or not self.decoder.row_by_row:
            return self._step(0, embeds)
        return np.concatenate([self._step(row, embeds[row : row + 1]) for row in range(B)])

    def _step(self, first: int, embeds: Float[np.ndarray, "B 1 D"]) -> Float32[np.ndarray, "B V"]:
        """Call the decoder once, for B rows from `first` on."""
        B = len(embeds)
        rows = slice(first, first + B)
        lengths, rope_deltas = self.lengths[rows], self.rope_deltas[rows]
        total = max(lengths) + 1
        bound = self._steps.get((first, B)) or self._bind_step(rows, embeds.shape[-1])
        bound.feeds["inputs_embeds"][...] = embeds
        positions = [length + delta for length, delta in zip(lengths, rope_deltas, strict=True)]
        bound.feeds["position_ids"][..., 0] = positions
        if total not in bound.masks:
            bound.masks_from(total)
        if B > 1:  # the mask of one row is always all ones
            mask = bound.mask[: B * total].reshape(B, total)
            np.less_equal(np.arange(total), np.array(lengths)[:, None], out=mask)
        bound.binding.bind_ortvalue_input("attention_mask", bound.masks[total])
        self._run(bound.binding)
        self.lengths[rows] = [length + 1 for length in lengths]
        return bound.logits if self._in_float32 else bound.logits.astype(np.float32)

    def _bind_step(self, rows: slice, width: int) -> _BoundStep:
        B = rows.stop - rows.start
        axes = (3,) if self.decoder.positions_rank == 3 else ()
        mask = np.ones(B * self.capacity, np.int64)
        logits = np.empty((B, 1, self.decoder.vocab_size), self.decoder.logits_dtype)
        feeds = {
            "inputs_embeds": np.zeros((B, 1, width), np.float32),
            "position_ids": np.zeros((*axes, B, 1), np.int64),
            "num_logits_to_keep": np.array(1, np.int64),
        }
        binding = self._bind(feeds, [buffer[rows] for buffer in self.buffers], logits)
        bound = _BoundStep(binding, feeds, mask, {}, logits[:, 0])
        self._steps[rows.start, B] = bound
        return bound

    def _bind(
        self, feeds: dict[str, np.ndarray], views: list[np.ndarray], logits: np.ndarray
    ) -> ort.IOBinding:
        """Bind inputs and logits, and each view both as a past and as its present.

        All arrays are contiguous, and the caller keeps them alive.
        """
        binding = self.decoder.session.io_binding()
        binding.bind_ortvalue_output("logits", to_ort(logits))
        for name, value in feeds.items():
            if name in self.decoder.inputs:
                binding.bind_ortvalue_input(name, to_ort(value))
        for port, view in zip(self.decoder.ports, views, strict=True):
            shared = to_ort(view)
            binding.bind_ortvalue_input(port.past, shared)
            binding.bind_ortvalue_output(port.present, shared)
        return binding

    def _run(self, binding: ort.IOBinding) -> None:
        try:
            self.decoder.session.run_with_iobinding(binding)
        except ORT_ERRORS as error:
            if is_out_of_memory(error):
                raise DeviceError(
                    f"not enough memory for the decoder: {first_line(error)}",
                    hint="use a smaller batch, fewer or smaller images, or a shorter prompt",
                    code="device.out-of-memory",
                ) from error
            raise BundleError(
                f"the decoder failed: {first_line(error)}",
                hint="run `vlmport inspect --probe` to test whether this device runs this bundle",
                code="graph.run-failed",
            ) from error

    def _with_batch(
        self, positions: Int64[np.ndarray, "... S"], shape: tuple[int, int]
    ) -> Int64[np.ndarray, "... 1 S"]:
        """Add the batch axis to one row's positions, and three axes if the decoder has them."""
        if self.decoder.positions_rank == 3 and positions.ndim == 1:
            positions = np.broadcast_to(positions, (3, len(positions)))
        return np.ascontiguousarray(positions.reshape(*positions.shape[:-1], *shape), np.int64)
