"""Caption every image of a folder and write one JSON line for each.

    python caption_folder.py FOLDER --model my-bundle > captions.jsonl

An image that can't be read gives a line with its error. The others are captioned.
"""

import argparse
import json
import sys
from pathlib import Path

import vlmport

ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="shapes", help="built-in name, bundle or checkpoint")
    parser.add_argument("--batch-size", type=int, default=8)
    arguments = parser.parse_args()
    paths = sorted(path for path in arguments.folder.rglob("*") if path.suffix.lower() in ENDINGS)
    failed = 0
    with vlmport.load(arguments.model) as model:
        results = model.caption_each(paths, batch_size=arguments.batch_size)
        for path, result in zip(paths, results, strict=True):
            line = {"image": path.relative_to(arguments.folder).as_posix()}
            if isinstance(result, vlmport.VlmportError):
                line["error"] = str(result)
                failed += 1
            else:
                line["caption"] = result.text.strip()
            print(json.dumps(line, ensure_ascii=False), flush=True)
    print(f"{len(paths) - failed} captioned, {failed} failed", file=sys.stderr)


if __name__ == "__main__":
    main()
