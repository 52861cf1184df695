"""What a scheduler counts."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class SchedulerStats:
    """A scheduler's state and its counters since it was made.

    Attributes:
        waiting: number of jobs whose prompt has not begun to run.
        prefilling: number of jobs whose prompt is running.
        running: number of jobs that write tokens.
        running_rows: number of rows of the cache that these two take.
        max_rows: maximum of running_rows.
        submitted: number of jobs that `submit` accepted.
        refused: number of requests that `submit` refused because the queue was full.
        ended: number of jobs that ended, by reason.
        prompt_tokens: tokens of all prompts that began to run, image tokens included.
        cached_tokens: how many of them were in the cache.
        prefill_tokens: tokens of prompts that the decoder ran.
        decode_tokens: tokens that were chosen, of all rows.
        steps: number of decode steps; decode_tokens / steps is the mean number of rows.
        images: number of images of all prompts.
        images_encoded: number of runs of the vision encoder.
        cache_bytes: size of the cached image features and prefix rows.
        running_bytes: size of the buffers of running rows; the system uses memory only for the
            part that was written.
    """

    waiting: int = 0
    prefilling: int = 0
    running: int = 0
    running_rows: int = 0
    max_rows: int = 0
    submitted: int = 0
    refused: int = 0
    ended: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    steps: int = 0
    images: int = 0
    images_encoded: int = 0
    cache_bytes: int = 0
    running_bytes: int = 0
