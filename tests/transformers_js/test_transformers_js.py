"""A bundle is a transformers.js repository: the unmodified client loads it offline and captions.

What the client must give is computed here by ONNX Runtime alone, with a loop of its own that
reads nothing but the Hub's files.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from filelock import FileLock
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, processors

from tests.checkpoints import END_OF_TEXT, write_json, write_prefix_checkpoint
from vlmport.bundle import ANY, Bundle
from vlmport.exporter import export, writing
from vlmport.runtime.model import VLM

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
VERSION = json.loads((HERE / "package.json").read_text())["dependencies"][
    "@huggingface/transformers"
]
SUFFIXES = {"fp32": "", "q8": "_quantized", "q4": "_q4"}
MODELS = ("embed_tokens", "vision_encoder", "decoder_model_merged")

Client = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def client(tmp_path_factory: pytest.TempPathFactory) -> Client:
    """Runs caption.mjs; installs what package-lock.json names where that has not been done."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        reason = "node and npm are not on PATH: install Node.js 20 or newer (nodejs.org)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(f"transformers.js NOT TESTED: {reason}")
    with FileLock(tmp_path_factory.getbasetemp().parent / "transformers_js.lock"):
        install(npm)
    return lambda *args, **options: run(node, *args, **options)


def install(npm: str) -> None:
    """`npm ci`, unless the pinned version is there. Fails where it fails."""
    installed = HERE / "node_modules/@huggingface/transformers/package.json"
    complete = HERE / "node_modules/.package-lock.json"  # npm writes it last
    if complete.is_file() and json.loads(installed.read_text())["version"] == VERSION:
        return
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    environment = {**os.environ, "ONNXRUNTIME_NODE_INSTALL": "skip"}
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"`npm ci` in {HERE.relative_to(ROOT)} failed:\n{done.stderr}")


def start(
    node: str, folder: Path, pictures: list[Any], *options: str
) -> subprocess.CompletedProcess:
    command = [node, str(HERE / "caption.mjs"), *options, str(folder), *map(str, pictures)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def run(
    node: str, folder: Path, pictures: list[Path], dtype: str | None = None, *, fed: bool = True
) -> dict[str, Any]:
    """The script's answer, after it has warned of nothing and reached for no network.

    Where `fed`, the client also gets the pixels of the bundle's own image processor.
    """
    options = [] if dtype is None else ["--dtype", dtype]
    if fed:
        file = folder.parent / f"{folder.name}-pixels.f32"
        file.write_bytes(pixel_values(folder, pictures).tobytes())
        options += ["--pixels", str(file)]
    done = start(node, folder, pictures, *options)
    assert done.returncode == 0, done.stderr
    assert "onnxruntime" not in done.stderr
    answer = json.loads(done.stdout)
    assert answer["version"] == VERSION
    assert answer["class"] == "LlavaForConditionalGeneration"
    assert answer["messages"] == []
    assert answer["network"] == []
    return answer


def session(file: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def pixel_values(folder: Path, pictures: list[Path]) -> np.ndarray:
    """float32 [pictures, 3, H, W] of image_processor.onnx."""
    processor = session(folder / "onnx/image_processor.onnx")
    arrays = [np.asarray(Image.open(picture).convert("RGB")) for picture in pictures]
    return np.concatenate([processor.run(["pixel_values"], {"image": one})[0] for one in arrays])


def greedy(
    folder: Path, pixels: np.ndarray, dtypes: Mapping[str, str]
) -> list[tuple[list[int], str]]:
    """Ids, up to the first stop token, and text of each row of a batch, by a growing cache."""
    config = json.loads((folder / "config.json").read_text())
    settings = json.loads((folder / "generation_config.json").read_text())
    embed, vision, decoder = (
        session(folder / f"onnx/{name}{SUFFIXES[dtypes[name]]}.onnx") for name in MODELS
    )
    (features,) = vision.run(["image_features"], {"pixel_values": pixels})
    rows, length = len(pixels), config["image_seq_length"]
    embeds = features.reshape(rows, length, -1)
    layers = config["text_config"]["num_hidden_layers"]
    heads, size = (config["text_config"][key] for key in ("num_key_value_heads", "head_dim"))
    names = [f"{layer}.{leaf}" for layer in range(layers) for leaf in ("key", "value")]
    cache = [np.zeros((rows, heads, 0, size), np.float32) for _ in names]
    ids = np.zeros((rows, 0), np.int64)
    positions = np.tile(np.arange(length), (rows, 1))
    for _ in range(settings["max_new_tokens"]):
        logits, *cache = decoder.run(
            ["logits", *(f"present.{name}" for name in names)],
            {
                "inputs_embeds": embeds,
                "attention_mask": np.ones((rows, positions[0, -1] + 1), np.int64),
                "position_ids": positions,
                "num_logits_to_keep": np.array(1, np.int64),
                **dict(zip((f"past_key_values.{name}" for name in names), cache, strict=True)),
            },
        )
        new = logits[:, -1].argmax(-1, keepdims=True)
        ids, positions = np.concatenate([ids, new], 1), positions[:, -1:] + 1
        (embeds,) = embed.run(["inputs_embeds"], {"input_ids": new})
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    kept = [until_stop(row, settings["eos_token_id"]) for row in ids.tolist()]
    return [(row, tokenizer.decode(row, skip_special_tokens=True)) for row in kept]


def until_stop(ids: list[int], stops: list[int]) -> list[int]:
    return next((ids[: i + 1] for i, one in enumerate(ids) if one in stops), ids)


def pairs(captions: list[dict[str, Any]]) -> list[tuple[list[int], str]]:
    return [(one["ids"], one["text"]) for one in captions]


def check_captions(folder: Path, pictures: list[Path], answer: Mapping[str, Any]) -> None:
    """The client's captions of our pixels are ours to the token, alone and in a batch."""
    pixels, dtypes = pixel_values(folder, pictures), answer["dtypes"]
    alone = [greedy(folder, pixels[i : i + 1], dtypes)[0] for i in range(len(pixels))]
    assert pairs(answer["fed"]["alone"]) == alone
    assert pairs(answer["fed"]["batch"]) == greedy(folder, pixels, dtypes)
    mix = ",".join(f"{name}={dtype}" for name, dtype in dtypes.items())
    with VLM.open(folder, precision=mix, threads=1) as vlm:
        ours = vlm.caption(pictures)
    assert [list(one.token_ids) for one in ours] == [ids for ids, _ in alone]


def check_files(folder: Path, answer: Mapping[str, Any]) -> None:
    """What the client would fetch for its dtypes is there, with all data that it refers to."""
    manifest = Bundle.open(folder).manifest
    variants = [manifest.components[name][dtype] for name, dtype in answer["dtypes"].items()]
    needed = {file for one in variants for file in (one.model, *one.data)}
    assert set(answer["files"]) == needed | {"config.json", "generation_config.json"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two pictures of other sizes and contents; PNG, so that all decoders agree."""
    folder = tmp_path_factory.mktemp("pictures")
    tall = Image.new("RGB", (37, 52), (240, 200, 20))
    ImageDraw.Draw(tall).ellipse((5, 9, 30, 40), fill=(20, 60, 200))
    wide = Image.linear_gradient("L").resize((90, 41)).convert("RGB")
    ImageDraw.Draw(wide).rectangle((50, 3, 80, 30), fill=(200, 30, 40))
    for name, picture in (("tall", tall), ("wide", wide)):
        picture.save(folder / f"{name}.png")
    return [folder / "tall.png", folder / "wide.png"]


@pytest.fixture(scope="module")
def examples() -> list[Path]:
    return sorted((ROOT / "examples").glob("*.png"))


@pytest.fixture(scope="module")
def shapes(built_in: Callable[[str], Bundle]) -> Path:
    return built_in("shapes").folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights. With a head of its own its captions vary; a tied one repeats the input."""
    folder = tmp_path_factory.mktemp("tiny")
    source = write_prefix_checkpoint(folder / "source", text={"tie_word_embeddings": False})
    return export(source, folder / "bundle").folder


@pytest.mark.parametrize("dtype", ["fp32", "q4"])
def test_shapes(client: Client, shapes: Path, examples: list[Path], dtype: str):
    answer = client(shapes, examples, dtype)
    assert answer["dtypes"] == dict.fromkeys(MODELS, dtype)
    check_captions(shapes, examples, answer)
    check_files(shapes, answer)


@pytest.mark.parametrize("dtype", ["fp32", "q4"])
def test_shapes_with_the_clients_own_preprocessing(
    client: Client, shapes: Path, examples: list[Path], dtype: str
):
    """Its resize has no antialiasing, so its pixels differ a little; the words must not."""
    answer = client(shapes, examples, dtype)
    texts = [one["text"] for one in answer["fed"]["alone"]]
    assert len(set(texts)) == len(examples), "is the checkpoint trained? its captions are alike"
    assert [one["text"] for one in answer["own"]["alone"]] == texts
    assert [one["text"] for one in answer["own"]["batch"]] == texts


@pytest.mark.parametrize("dtype", ["fp32", "q4"])
def test_random_weights(client: Client, tiny: Path, pictures: list[Path], dtype: str):
    answer = client(tiny, pictures, dtype)
    check_captions(tiny, pictures, answer)
    check_files(tiny, answer)
    first, second = answer["fed"]["alone"]
    assert first["ids"] != second["ids"]  # the pixels matter
    assert len(set(first["ids"])) > 4  # and so do the tokens before


def test_rows_of_a_batch_stop_on_their_own(
    client: Client, tiny: Path, pictures: list[Path], tmp_path: Path
):
    """At any of several stop tokens."""
    first, second = (one["ids"] for one in client(tiny, pictures, "fp32")["fed"]["alone"])
    text = {"tie_word_embeddings": False, "eos_token_id": [first[3], second[8]]}
    source = write_prefix_checkpoint(tmp_path / "source", text=text)
    folder = export(source, tmp_path / "bundle", precisions="fp32").folder
    answer = client(folder, pictures)
    check_captions(folder, pictures, answer)
    lengths = [len(one["ids"]) for one in answer["fed"]["batch"]]
    assert len(set(lengths)) == 2
    assert max(lengths) < len(first)


def test_without_a_dtype_it_takes_the_bundles_choice(
    client: Client, tiny: Path, pictures: list[Path]
):
    answer = client(tiny, pictures)
    auto = Bundle.open(tiny).manifest.auto["cpu"]
    assert answer["dtypes"] == {name: dtype for name, dtype in auto.items() if dtype != ANY}
    check_captions(tiny, pictures, answer)


@pytest.mark.parametrize("precision", ["fp32", "q4"])
def test_without_a_dtype_a_bundle_of_one_precision_works(
    client: Client, tiny: Path, pictures: list[Path], tmp_path: Path, precision: str
):
    source = tiny.parent / "source"
    folder = export(source, tmp_path / "bundle", precisions=precision).folder
    answer = client(folder, pictures)
    assert answer["dtypes"] == dict.fromkeys(MODELS, precision)
    check_captions(folder, pictures, answer)


def test_weights_in_a_file_of_their_own(client: Client, pictures: list[Path], tmp_path: Path):
    """A decoder beyond 16 MiB."""
    text = {"hidden_size": 256, "num_attention_heads": 8, "head_dim": 32, "num_hidden_layers": 1}
    text |= {"intermediate_size": 6000}
    source = write_prefix_checkpoint(tmp_path / "source", text=text)
    folder = export(source, tmp_path / "bundle", precisions="fp32").folder
    assert (folder / "onnx/decoder_model_merged.onnx_data").is_file()
    assert not (folder / "onnx/vision_encoder.onnx_data").exists()
    answer = client(folder, pictures, "fp32")
    check_captions(folder, pictures, answer)
    check_files(folder, answer)


def test_weights_in_several_files(
    client: Client,
    tiny: Path,
    pictures: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """As a model beyond 2 GB has them."""
    monkeypatch.setattr(writing, "INLINE_BYTES", 0)
    monkeypatch.setattr(writing, "DATA_FILE_BYTES", 30_000)
    folder = export(tiny.parent / "source", tmp_path / "bundle", precisions="fp32").folder
    assert (folder / "onnx/decoder_model_merged.onnx_data_2").is_file()
    answer = client(folder, pictures, "fp32")
    check_captions(folder, pictures, answer)
    check_files(folder, answer)


def test_bad_words_of_the_source_are_not_said(
    client: Client, tiny: Path, pictures: list[Path], tmp_path: Path
):
    """Nor is anything sampled, whatever the source did."""
    said = client(tiny, pictures, "fp32")["fed"]["alone"][0]["ids"]
    source = Path(shutil.copytree(tiny.parent / "source", tmp_path / "source"))
    settings = {"bad_words_ids": [[said[0]], said[2:4]], "do_sample": True, "temperature": 2.0}
    write_json(source / "generation_config.json", settings)
    folder = export(source, tmp_path / "bundle", precisions="fp32").folder
    first, again = (client(folder, pictures)["fed"]["alone"][0]["ids"] for _ in range(2))
    assert first == again
    assert said[0] not in first
    assert said[2:4] not in [first[i : i + 2] for i in range(len(first))]


@pytest.mark.parametrize("dtype", ["fp32", "q4"])
def test_all_weights_in_files_of_their_own(
    client: Client,
    tiny: Path,
    pictures: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
):
    monkeypatch.setattr(writing, "INLINE_BYTES", 0)
    folder = export(tiny.parent / "source", tmp_path / "bundle").folder
    assert all((folder / f"onnx/{name}{SUFFIXES[dtype]}.onnx_data").is_file() for name in MODELS)
    answer = client(folder, pictures, dtype)
    check_captions(folder, pictures, answer)
    check_files(folder, answer)


def test_a_tokenizer_that_adds_cuts_and_pads(client: Client, pictures: list[Path], tmp_path: Path):
    """The client tokenizes with special tokens added; the prompt is pictures and nothing else."""
    source = write_prefix_checkpoint(tmp_path / "source", text={"tie_word_embeddings": False})
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=40, pad_token=END_OF_TEXT)
    tokenizer.save(str(source / "tokenizer.json"))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True}
    write_json(source / "tokenizer_config.json", settings)
    folder = export(source, tmp_path / "bundle", precisions="fp32").folder
    written = json.loads((folder / "tokenizer.json").read_text())
    assert (written["truncation"], written["padding"]) == (None, None)
    check_captions(folder, pictures, client(folder, pictures))


def test_the_script_refuses_the_network(client: Client, tiny: Path):
    """Else an empty list of attempts would prove nothing."""
    node = shutil.which("node")
    assert node is not None
    done = start(node, tiny, ["http://localhost:9/picture.png"])
    assert done.returncode != 0
    assert "this test allows no network" in done.stderr
