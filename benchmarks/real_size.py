"""A checkpoint of a published size with random weights: time and peak memory to export, to answer
and to be verified.

    python benchmarks/real_size.py CONFIGS TOKENIZER [--folder TMP] [--precision q4] [--shards 2]
        [--verify fp32] [--requests "text alone,drawn 1300x60"]
    python benchmarks/real_size.py captioner [--spelling v4] …

CONFIGS holds the real config.json, preprocessor_config.json and whatever else of JSON the model's
repository has beside its tokenizer, TOKENIZER the real tokenizer. The tensors have the names and
shapes of transformers' own model (transformers 4's names for Qwen2.5-VL, as its repositories have
them), in bfloat16, in safetensors shards. The captioner is that of `captioner.py`, with LoRA. Each
step is a process of its own; memory is the most that it held. The answer is noise: what counts is
that it comes. `--verify` climbs the ladder of `vlmport verify` at the precisions named, with all of
its requests or those of `--requests`; random weights hold the limits of fp32 alone. Takes twice the
checkpoint's size on the disk, and deletes it all. Prints a table, then one line of JSON.
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
from vlmport.bundle import read_manifest

PACKAGES = ("vlmport", "onnx", "onnx-ir", "onnxruntime", "transformers")
BLOCK = 1 << 22  # random values, repeated from another place for each tensor
TOKENS = 8
CAPTIONER = "captioner"


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


def child(options: argparse.Namespace) -> dict[str, float | str | None]:
    """One step, of the checkpoint and the bundle that stand for CONFIGS and TOKENIZER."""
    source, out = options.configs, options.tokenizer
    start = time.perf_counter()
    if options.child == "export":
        from vlmport.exporter import export

        export(source, out, precisions=options.precision)
        said = ""
    elif options.child == "answer":
        said = answer(out)
    else:
        said = climb(source, out, options.verify.split(","), options.requests)
    return {"seconds": time.perf_counter() - start, "peak": peak_memory(), "said": said}


def answer(out: Path) -> str:
    """A question about a picture, or its caption from a model that takes no question."""
    from vlmport.runtime.model import VLM

    picture, question = {"type": "image"}, {"type": "text", "text": "What?"}
    with VLM.open(out) as vlm:
        messages = [{"role": "user", "content": [picture, question]}]
        if vlm.components.manifest.prompt.caption[0]["content"] == [picture]:
            messages = [{"role": "user", "content": [picture]}]
        made = vlm.generate(messages, [gradient()], max_new_tokens=TOKENS, do_sample=False)
    return f"{made.counts['prompt_tokens']} tokens in, {len(made.token_ids)} out"


def climb(source: Path, out: Path, precisions: list[str], requests: str | None) -> str:
    """`vlmport verify` with some of its requests, and without a note in the bundle."""
    from rich.console import Console

    from vlmport.bundle import Bundle
    from vlmport.parity.ladders import run_ladder
    from vlmport.parity.pictures import drawn_pictures
    from vlmport.parity.references import load_reference
    from vlmport.parity.report import Report
    from vlmport.parity.rounding import weight_rows

    bundle = Bundle.open(out)
    reference = load_reference(source, image_token_id=bundle.manifest.prompt.image_token_id)
    known = {one.name: one for one in reference.requests(drawn_pictures())}
    names = list(known) if requests is None else requests.split(",")
    if unknown := sorted(set(names) - known.keys()):
        raise SystemExit(f"no request {', '.join(unknown)}; known: {', '.join(known)}")
    rows = run_ladder(reference, bundle, precisions, [known[name] for name in names])
    weights = tuple(row for name in precisions for row in weight_rows(bundle, name))
    report = Report(reference.versions, rows + weights)
    report.print(Console(width=100))
    return f"{', '.join(names)}: {len(report.rows) - len(report.failures)} of {len(report.rows)}"


def in_process(
    what: str, source: Path, out: Path, options: argparse.Namespace
) -> dict[str, float | str]:
    """What `child` gives; what it prints before that is printed."""
    command = [sys.executable, __file__, str(source), str(out), "--child", what]
    for name in ("precision", "verify", "requests"):
        if (value := getattr(options, name)) is not None:
            command += [f"--{name}", value]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    *lines, made = done.stdout.splitlines()
    print(*lines, sep="\n", end="\n" if lines else "")
    return json.loads(made)


def write_source(folder: Path, options: argparse.Namespace) -> int:
    """Bytes of weights."""
    if str(options.configs) != CAPTIONER:
        return write_checkpoint(folder, options.configs, options.tokenizer, options.shards)
    from captioner import REAL, write_captioner

    write_captioner(folder, REAL, spelling=options.spelling)
    return sum(one.stat().st_size for one in folder.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", type=Path, help=f"a folder, or the word {CAPTIONER}")
    parser.add_argument("tokenizer", type=Path, nargs="?")
    parser.add_argument("--folder", help="where to write for the time being")
    parser.add_argument("--precision", default="q4")
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--spelling", choices=("v4", "v5"), default="v5", help="of the captioner")
    parser.add_argument("--verify", metavar="PRECISIONS", help="against transformers")
    parser.add_argument("--requests", metavar="NAMES", help="of the ladder's, with commas")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options)))
        return
    if options.tokenizer is None and str(options.configs) != CAPTIONER:
        parser.error("the folder of a tokenizer is missing")
    result: dict[str, object] = {"machine": describe_machine(None, PACKAGES), **vars(options)}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, out = Path(folder, "checkpoint"), Path(folder, "bundle")
        size = write_source(source, options)
        shards = len(list(source.glob("*.safetensors")))
        print(f"checkpoint: {size / 1e9:.2f} GB in {shards} files", flush=True)
        for what in ("export", "answer", *(["verify"] if options.verify else [])):
            row = in_process(what, source, out, options)
            print(f"{what:8}{row['seconds']:8.1f} s{row['peak'] / 1e6:8.0f} MB  {row['said']}")
            sys.stdout.flush()
            result[what] = row
        files = {one.name: one.stat().st_size for one in (out / "onnx").iterdir()}
        manifest = read_manifest(out / "vlmport.json")
        needed = manifest.files_of(manifest.choose("auto"))
        result["auto"] = sum(manifest.files[name].size for name in needed)
    for name, size in sorted(files.items()):
        print(f"{size / 1e6:10.1f} MB  {name}")
    print(f"{result['auto'] / 1e6:10.1f} MB  what auto needs")
    result["files"] = files
    print(json.dumps(result, default=str))


if __name__ == "__main__":
    main()
