"""A Qwen-VL checkpoint of a published size with random weights: time and peak memory to export and
to answer.

    python benchmarks/real_size.py CONFIGS TOKENIZER [--folder TMP] [--precision q4] [--shards 2]

CONFIGS holds the real config.json, generation_config.json and preprocessor_config.json, TOKENIZER
the real tokenizer. The tensors have the names and shapes of transformers' own model (transformers
4's names for Qwen2.5-VL, as its repositories have them), in bfloat16, in safetensors shards. Export
and answer are processes of their own; memory is the most that each held. The answer is noise: what
counts is that it comes. Takes twice the checkpoint's size on the disk, and deletes it all. Prints a
table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vlmport.benchmark.machine import describe_machine, peak_memory
from vlmport.benchmark.picture import gradient

PACKAGES = ("vlmport", "onnx", "onnx-ir", "onnxruntime", "transformers")
BLOCK = 1 << 22  # random values, repeated from another place for each tensor
TOKENS = 8


def shapes(configs: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor that the model's repository holds."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(str(configs))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    tied = bool(config.tie_word_embeddings)
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        if config.model_type == "qwen2_5_vl":
            name = name.replace("model.visual.", "visual.").replace(
                "model.language_model.", "model."
            )
        yield name, tuple(tensor.shape)


def write_checkpoint(folder: Path, configs: Path, tokenizer: Path, shards: int) -> int:
    """Bytes of weights."""
    folder.mkdir()
    for source in (*tokenizer.glob("*.json"), *tokenizer.glob("*.jinja"), *configs.glob("*.json")):
        shutil.copyfile(source, folder / source.name)
    rng = np.random.default_rng(0)
    # bfloat16 is the upper half of float32.
    noise = (rng.standard_normal(BLOCK, np.float32) * 0.02).view(np.uint32) >> 16
    noise, one = noise.astype(np.uint16), np.uint16(np.float32(1).view(np.uint32) >> 16)
    tensors = list(shapes(configs))
    total = sum(2 * int(np.prod(shape)) for _, shape in tensors)
    parts, room = [[]], total / shards
    for name, shape in tensors:
        if room < 0 and len(parts) < shards:
            parts.append([])
            room = total / shards
        parts[-1].append((name, shape))
        room -= 2 * int(np.prod(shape))
    index = {}
    for number, part in enumerate(parts, 1):
        path = folder / f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        index |= {name: path.name for name, _ in part}
        header, at = {}, 0
        for name, shape in part:
            size = 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header).encode()
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, shape in part:
                count = int(np.prod(shape))
                module = name.split(".")[-2]
                if name.endswith(".weight") and ("norm" in module or module == "ln_q"):
                    np.full(count, one).tofile(file)
                    continue
                start = int(rng.integers(BLOCK))
                while count:
                    piece = noise[start : start + count]
                    piece.tofile(file)
                    count, start = count - len(piece), 0
    listing = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listing))
    return total


def child(what: str, source: Path, out: Path, precision: str) -> dict[str, float | str | None]:
    start = time.perf_counter()
    if what == "export":
        from vlmport.export import export

        export(source, out, precisions=precision)
        said = ""
    else:
        from vlmport.runtime.model import VLM

        message = {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "What?"}],
        }
        with VLM.open(out, precision=precision) as vlm:
            answer = vlm.generate([message], [gradient()], max_new_tokens=TOKENS, do_sample=False)
        said = f"{answer.counts['prompt_tokens']} tokens in, {len(answer.token_ids)} out"
    return {"seconds": time.perf_counter() - start, "peak": peak_memory(), "said": said}


def in_process(what: str, source: Path, out: Path, precision: str) -> dict[str, float]:
    command = [sys.executable, __file__, str(source), str(out), "--child", what]
    done = subprocess.run([*command, "--precision", precision], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--folder", help="where to write for the time being")
    parser.add_argument("--precision", default="q4")
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        made = child(options.child, options.configs, options.tokenizer, options.precision)
        print(json.dumps(made))
        return
    result: dict[str, object] = {"machine": describe_machine(PACKAGES), **vars(options)}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, out = Path(folder, "checkpoint"), Path(folder, "bundle")
        size = write_checkpoint(source, options.configs, options.tokenizer, options.shards)
        print(f"checkpoint: {size / 1e9:.2f} GB in {options.shards} shards", flush=True)
        for what in ("export", "answer"):
            row = in_process(what, source, out, options.precision)
            print(f"{what:8}{row['seconds']:8.1f} s{row['peak'] / 1e6:8.0f} MB  {row['said']}")
            sys.stdout.flush()
            result[what] = row
        files = {one.name: one.stat().st_size for one in (out / "onnx").iterdir()}
    for name, size in sorted(files.items()):
        print(f"{size / 1e6:10.1f} MB  {name}")
    result["files"] = files
    print(json.dumps(result, default=str))


if __name__ == "__main__":
    main()
