"""Caption once in a new process, and print the peak memory.

    python -m vlmport.benchmark.cold BUNDLE PRECISION DEVICE THREADS WIDTH HEIGHT TOKENS

THREADS is 0 for one per core. Prints one line of JSON.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    """Caption an image of the size in the arguments."""
    folder, precision, device, *numbers = sys.argv[1:]
    threads, width, height, tokens = map(int, numbers)

    from vlmport.benchmark.picture import gradient
    from vlmport.runtime.model import VLM

    with VLM.open(folder, precision=precision, device=device, threads=threads or None) as vlm:
        picture = gradient(width, height)
        caption = vlm.caption(picture, max_new_tokens=tokens, min_new_tokens=tokens)
    from vlmport.benchmark.machine import peak_memory

    done = {"new_tokens": caption.counts["new_tokens"], "peak_bytes": peak_memory()}
    print(json.dumps(done), flush=True)


if __name__ == "__main__":
    main()
