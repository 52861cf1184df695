"""The manifest: read, written, refused in plain words; files compared with it."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastjsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import manifest_reference
from tests.checkpoints import write_json
from tests.errors import raises
from vlmport.bundle import (
    CHUNK_BYTES,
    MANIFEST,
    Bundle,
    Dims,
    FileEntry,
    GenerationSpec,
    Manifest,
    PromptSpec,
    hash_file,
    hash_folder,
    is_bundle,
    read_manifest,
    write_manifest,
)
from vlmport.bundle import folder as bundle_folder
from vlmport.bundle.downloads import check_once
from vlmport.bundle.records import fields, from_json, to_json
from vlmport.errors import BundleError
from vlmport.loading import resolve

ROOT = Path(__file__).parents[2]
DECODER = "onnx/decoder_model_merged.onnx"


@pytest.fixture(scope="session")
def document(tiny_bundle: Path) -> dict[str, Any]:
    """The tiny bundle's vlmport.json; copy it before changing it."""
    return json.loads((tiny_bundle / MANIFEST).read_text(encoding="utf-8"))


def refusal(folder: Path, raw: Any) -> BundleError:
    write_json(folder / MANIFEST, raw)
    with pytest.raises(BundleError) as caught:
        read_manifest(folder / MANIFEST)
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    return caught.value


# Reading and writing


def test_what_is_written_is_read_again(tiny_bundle: Path, tmp_path: Path) -> None:
    manifest = read_manifest(tiny_bundle / MANIFEST)
    write_manifest(tmp_path, manifest)
    assert (tmp_path / MANIFEST).read_bytes() == (tiny_bundle / MANIFEST).read_bytes()
    assert read_manifest(tmp_path / MANIFEST) == manifest
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]


def test_the_manifest_holds_what_a_runtime_needs(tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle / MANIFEST)
    assert manifest.dims.num_key_value_heads == 2
    assert manifest.dims.context_length == 2048
    assert manifest.cache.past == "past_key_values."
    assert manifest.generation.stop_token_ids == (0,)
    assert manifest.prompt.caption == ({"role": "user", "content": [{"type": "image"}]},)
    assert manifest.pixels.resample == "bicubic"
    assert manifest.pixels.equals.startswith("Pillow ")
    assert manifest.producer.startswith("vlmport ")
    assert manifest.parity is None


def test_the_schema_in_the_docs_describes_what_an_export_writes(document: dict[str, Any]) -> None:
    schema = json.loads((ROOT / "docs/vlmport.schema.json").read_text("utf-8"))
    validate = fastjsonschema.compile(schema)
    validate(document)
    assert set(schema["required"]) == set(document)
    for key in document:
        with pytest.raises(fastjsonschema.JsonSchemaValueException):
            validate({name: value for name, value in document.items() if name != key})
    for key, record in {"dims": Dims, "prompt": PromptSpec, "generation": GenerationSpec}.items():
        fields = {field.name for field in dataclasses.fields(record)}
        assert set(schema["properties"][key]["required"]) == fields == set(document[key])


def test_every_field_of_the_dataclass_is_in_the_schema(document: dict[str, Any]) -> None:
    fields = {field.name for field in dataclasses.fields(Manifest)}
    optional = {"accuracy", "ignored_weights", "image_options", "layout"}
    # absent unless there is something to say
    assert set(document) == (fields - optional) | {"format", "version"}
    schema = json.loads((ROOT / "docs/vlmport.schema.json").read_text("utf-8"))
    assert set(schema["properties"]) == fields | {"format", "version"}


def test_the_schema_and_the_typescript_types_are_generated() -> None:
    for path, text in manifest_reference.files().items():
        assert path.read_text("utf-8") == text, "run python -m tests.manifest_reference"


def test_a_key_is_absent_where_its_field_has_the_default(document: dict[str, Any]) -> None:
    optional = {
        "layout": "genai",
        "image_options": {"split": True},
        "ignored_weights": {"a": ("b",)},
    }
    manifest = from_json(Manifest, document)
    assert not set(optional) & set(to_json(manifest))
    written = to_json(dataclasses.replace(manifest, **optional))
    assert written["ignored_weights"] == {"a": ["b"]}
    assert from_json(Manifest, written) == dataclasses.replace(manifest, **optional)


def test_a_size_that_is_no_field_is_left_out(document: dict[str, Any], tmp_path: Path) -> None:
    dims = document["dims"] | {"of_a_newer_version": 7}
    write_json(tmp_path / MANIFEST, document | {"dims": dims})
    assert to_json(read_manifest(tmp_path / MANIFEST).dims).keys() == fields(Dims).keys()


# Refusals

EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no dims": (lambda raw: raw.pop("dims"), "manifest must contain ['dims'] properties"),
    "no head_dim": (
        lambda raw: raw["dims"].pop("head_dim"),
        "manifest.dims must contain ['head_dim'] properties",
    ),
    "a stop id as text": (
        lambda raw: raw["generation"].update(stop_token_ids=[0, "2"]),
        "manifest.generation.stop_token_ids[1] must be integer",
    ),
    "an unknown key": (
        lambda raw: raw.update(extra=1),
        "manifest must not contain {'extra'} properties",
    ),
    "another format": (
        lambda raw: raw.update(format="other"),
        "manifest.format must be same as const definition: vlmport",
    ),
    "no decoder": (
        lambda raw: raw["components"].pop("decoder_model_merged"),
        "layout hub: no component decoder_model_merged",
    ),
    "a short hash": (
        lambda raw: raw["files"][DECODER].update(sha256="abc"),
        f"manifest.files.{DECODER}.sha256 must match pattern",
    ),
    "a negative size": (
        lambda raw: raw["files"][DECODER].update(size=-1),
        "size must be bigger than or equal to 0",
    ),
    "an image option as text": (
        lambda raw: raw.update(image_options={"split": "yes"}),
        "manifest.image_options.split must be boolean or number",
    ),
    "a short golden": (
        lambda raw: raw["golden"].update(prefill_tokens=20),
        "manifest.golden.prefill_tokens must be bigger than or equal to 64",
    ),
    "an unlisted graph": (lambda raw: raw["files"].pop(DECODER), f"{DECODER} is not in files"),
    "an auto of no precision": (
        lambda raw: raw["auto"]["cpu"].update(vision_encoder="fp16"),
        "auto.cpu: no vision_encoder in fp16",
    ),
    "an auto that forgets one": (
        lambda raw: raw["auto"]["webgpu"].pop("embed_tokens"),
        "auto.webgpu: no choice for embed_tokens",
    ),
    "an auto of no component": (
        lambda raw: raw["auto"]["cpu"].update(audio_encoder="fp32"),
        "auto.cpu: no audio_encoder in fp32",
    ),
    "logits without ids": (
        lambda raw: raw["golden"]["expected"]["q4"]["logits"].pop(),
        "golden.expected.q4: 63 logits for 64 ids",
    ),
    "a logit of no token": (
        lambda raw: raw["golden"]["expected"]["q4"]["logit_ids"].append(113),
        "golden.expected.q4: logit id 113 is not in the vocabulary",
    ),
    "no logits": (
        lambda raw: raw["golden"]["expected"]["fp32"].update(logits=[], logit_ids=[]),
        "logit_ids must contain at least 1 items",
    ),
    "a logit that no float32 holds": (
        lambda raw: raw["golden"]["expected"]["fp32"]["logits"].__setitem__(0, 10**400),
        "logits[0] must be smaller than or equal to 1e+38",
    ),
    "a golden past the context": (
        lambda raw: raw["dims"].update(context_length=80),
        "golden.expected.fp32: takes 90 positions, the context is 80",
    ),
    "a golden of all memory": (
        lambda raw: raw["golden"].update(copies=10**11),
        "manifest.golden.copies must be smaller than or equal to 64",
    ),
    "a missing chunk": (
        lambda raw: raw["files"][DECODER]["chunks"].clear(),
        f"{DECODER}: 0 chunk hashes, expected 1",
    ),
    "no cpu": (lambda raw: raw["auto"].pop("cpu"), "manifest.auto must contain ['cpu']"),
}


@pytest.mark.parametrize(("edit", "expected"), EDITS.values(), ids=EDITS)
def test_faults_are_named_with_their_place(
    edit: Callable[[dict[str, Any]], Any],
    expected: str,
    document: dict[str, Any],
    tmp_path: Path,
) -> None:
    raw = copy.deepcopy(document)
    edit(raw)
    error = refusal(tmp_path, raw)
    assert expected in str(error)
    assert str(tmp_path / MANIFEST) in str(error)


def test_a_message_is_short_whatever_the_file_holds(document: dict[str, Any], tmp_path: Path):
    document["auto"]["cpu"] = dict.fromkeys(document["components"], "x" * 5000)
    assert len(str(refusal(tmp_path, document))) < 2000


@pytest.mark.parametrize("version", [2, 99, 2.0])
def test_a_newer_version_asks_for_an_update(
    version: float, document: dict[str, Any], tmp_path: Path
) -> None:
    error = refusal(tmp_path, {**document, "version": version, "something": "new"})
    assert f"manifest version {version}; this vlmport reads up to 1" in str(error)
    assert error.hint == "pip install --upgrade vlmport"


@pytest.mark.parametrize("version", [0, -1, "1", None, True])
def test_a_version_that_is_none_is_refused(
    version: Any, document: dict[str, Any], tmp_path: Path
) -> None:
    assert "manifest.version must be" in str(refusal(tmp_path, {**document, "version": version}))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "\xff", '{"a": NaN}', "[" * 100_000, "9" * 5000],
    ids=["empty", "cut", "a list", "null", "latin-1", "NaN", "deep", "a long number"],
)
def test_what_is_no_manifest_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(text.encode("latin-1"))
    with raises(BundleError, "source.not-json", MANIFEST) as caught:
        read_manifest(tmp_path / MANIFEST)
    assert caught.value.hint


def test_a_folder_without_one_is_no_bundle(tmp_path: Path) -> None:
    assert not is_bundle(tmp_path)
    for folder in (tmp_path, tmp_path / "nowhere"):
        with raises(BundleError, "bundle.no-manifest", "vlmport.json"):
            Bundle.open(folder)


BAD_NAMES = [
    "../secret",
    "/etc/passwd",
    "onnx/../../x",
    "",
    ".hidden",
    "a//b",
    "a\\b",
    "C:x",
    "a\n",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_lead_out_of_the_folder_are_refused(
    name: str, document: dict[str, Any], tmp_path: Path
) -> None:
    raw = copy.deepcopy(document)
    raw["files"][name] = raw["files"][DECODER]
    assert "manifest.files must not contain" in str(refusal(tmp_path, raw))
    for key in ("model", "data"):
        raw = copy.deepcopy(document)
        variant = raw["components"]["decoder_model_merged"]["fp32"]
        variant[key] = name if key == "model" else [name]
        error = refusal(tmp_path, raw)
        assert f"manifest.components.decoder_model_merged.fp32.{key}" in str(error)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
    | st.sampled_from(["fp32", "q4", "any", "cpu", DECODER, "0" * 64]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_change_is_read_or_refused(
    data: st.DataObject, document: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Never another exception, and what is read can be asked."""
    raw: Any = copy.deepcopy(document)
    for _ in range(data.draw(st.integers(1, 3))):
        mutate(raw, data)
    path = tmp_path_factory.getbasetemp() / "mutated.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    try:
        manifest = read_manifest(path)
        for device in ("cpu", "webgpu", "other"):
            assert set(manifest.choose("auto", device)) == set(manifest.components)
        assert isinstance(manifest.precisions, tuple)
    except BundleError:
        return


def mutate(raw: Any, data: st.DataObject) -> None:
    """Replace, delete or add something at a random place."""
    node: Any = raw
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = data.draw(st.sampled_from(keys))
        if isinstance(node[key], dict | list) and node[key] and data.draw(st.integers(0, 3)):
            node = node[key]
            continue
        action = data.draw(st.sampled_from(["replace", "delete", "add"]))
        if action == "delete":
            del node[key]
        elif action == "replace":
            node[key] = data.draw(json_values)
        elif isinstance(node, dict):
            node[data.draw(st.text(max_size=5))] = data.draw(json_values)
        else:
            node.append(data.draw(json_values))
        return


# Files


def test_bad_files_are_all_named(own_bundle_folder: Path) -> None:
    (own_bundle_folder / "config.json").unlink()
    (own_bundle_folder / DECODER).write_bytes(b"short")
    with pytest.raises(BundleError) as caught:
        Bundle.open(own_bundle_folder)
    text = str(caught.value)
    assert "2 of 18 files are not as vlmport.json says" in text
    assert "config.json: missing" in text
    assert f"{DECODER}: 5 bytes, expected " in text
    assert caught.value.hint == "download or export the bundle again"


def test_a_changed_byte_is_found_by_its_hash(own_bundle_folder: Path) -> None:
    file = own_bundle_folder / DECODER
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    Bundle.open(own_bundle_folder)
    with raises(BundleError, "bundle.not-as-listed", DECODER, "SHA-256"):
        Bundle.open(own_bundle_folder, check_hashes=True)


def test_further_files_do_no_harm(own_bundle_folder: Path) -> None:
    (own_bundle_folder / ".gitattributes").write_text("*.onnx filter=lfs", encoding="utf-8")
    Bundle.open(own_bundle_folder, check_hashes=True)


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1])
def test_every_8_mib_have_a_hash(size: int, tmp_path: Path) -> None:
    content = bytes(range(256)) * (size // 256 + 1)
    content = content[:size]
    (tmp_path / "file").write_bytes(content)
    parts = [content[i : i + CHUNK_BYTES] for i in range(0, size, CHUNK_BYTES)]
    expected = [hashlib.sha256(part).hexdigest() for part in parts]
    whole = hashlib.sha256(content).hexdigest()
    assert hash_file(tmp_path / "file") == FileEntry(size, whole, tuple(expected))


def test_a_folder_is_hashed_with_forward_slashes_and_without_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "b/c").mkdir(parents=True)
    for name in ("b/c/d", "a", MANIFEST):
        (tmp_path / name).write_text(name, encoding="utf-8")
    assert list(hash_folder(tmp_path)) == ["a", "b/c/d"]


def write_parity(folder: Path, parity: dict[str, Any]) -> None:
    write_manifest(folder, dataclasses.replace(read_manifest(folder / MANIFEST), parity=parity))


def test_parity_is_added(own_bundle_folder: Path) -> None:
    parity = {"reference": "torch", "passed": True, "rows": [{"rung": "pixels"}]}
    write_parity(own_bundle_folder, parity)
    assert Bundle.open(own_bundle_folder, check_hashes=True).manifest.parity == parity


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_a_parity_that_json_cannot_hold_is_refused(own_bundle_folder: Path, value: Any) -> None:
    before = (own_bundle_folder / MANIFEST).read_bytes()
    parity = {"reference": "torch", "passed": False, "rows": [{"worst": value}]}
    with raises(BundleError, "bundle.unwritable", "vlmport.json") as caught:
        write_parity(own_bundle_folder, parity)
    assert caught.value.hint
    with raises(BundleError, "bundle.unwritable", "data.parity"):
        write_parity(own_bundle_folder, {"passed": True})
    assert (own_bundle_folder / MANIFEST).read_bytes() == before
    assert not list(own_bundle_folder.glob("*.partial"))


def test_the_card_may_be_edited(own_bundle_folder: Path) -> None:
    (own_bundle_folder / "README.md").write_text("my own words", encoding="utf-8")
    Bundle.open(own_bundle_folder, check_hashes=True)
    (own_bundle_folder / "README.md").unlink()
    Bundle.open(own_bundle_folder, check_hashes=True)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "/etc/passwd"},
        {"type": "image", "path": "secret.png"},
        {"type": "image", "url": "https://example.org/a.png"},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "text", "text": "a", "image": "x.png"},
        {"type": "text", "text": 1},
        "text",
    ],
)
def test_what_asks_for_a_caption_names_no_file(
    part: Any, document: dict[str, Any], tmp_path: Path
) -> None:
    document["prompt"]["caption"] = [{"role": "user", "content": [part]}]
    (tmp_path / MANIFEST).write_text(json.dumps(document))
    with pytest.raises(BundleError) as caught:
        read_manifest(tmp_path / MANIFEST)
    assert caught.value.code == "bundle.malformed"
    assert "caption" in str(caught.value)


@pytest.fixture
def record(own_bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where it is remembered that the own bundle is right."""
    monkeypatch.setenv("VLMPORT_CACHE", str(tmp_path / "cache"))
    check_once(Bundle.open(own_bundle_folder), ["tokenizer.json"])
    (found,) = (tmp_path / "cache/verified").iterdir()
    return found


def test_hashes_are_compared_once(
    own_bundle_folder: Path, record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, read = Bundle.open(own_bundle_folder), []
    hash_file = bundle_folder.hash_file
    monkeypatch.setattr(
        bundle_folder, "hash_file", lambda path: (read.append(path.name), hash_file(path))[1]
    )
    check_once(bundle, ["tokenizer.json"])
    assert read == []
    check_once(bundle, ["tokenizer.json", "config.json"])
    assert read == ["config.json"]
    os.utime(own_bundle_folder / "config.json")
    check_once(bundle, ["tokenizer.json", "config.json"])
    assert read == ["config.json"] * 2
    for text in ("", "[", "[1]", '{"tokenizer.json": 1}'):
        record.write_text(text)
        check_once(bundle, ["tokenizer.json"])
    assert read == ["config.json"] * 2 + ["tokenizer.json"] * 4


def test_a_changed_file_is_found_and_not_remembered(own_bundle_folder: Path, record: Path) -> None:
    file, bundle = own_bundle_folder / "tokenizer.json", Bundle.open(own_bundle_folder)
    before = record.read_bytes()
    file.write_bytes(file.read_bytes().replace(b"a", b"b", 1))
    for _ in range(2):
        with pytest.raises(BundleError) as caught:
            check_once(bundle, ["tokenizer.json"])
        assert caught.value.code == "bundle.not-as-listed"
    assert record.read_bytes() == before


def test_a_cache_that_can_not_be_written_does_no_harm(
    own_bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VLMPORT_CACHE", str(tmp_path / "file"))
    check_once(Bundle.open(own_bundle_folder), ["tokenizer.json"])


def test_hashes_of_a_local_bundle_by_request(own_bundle_folder: Path) -> None:
    file = own_bundle_folder / "tokenizer_config.json"
    file.write_bytes(file.read_bytes().replace(b"a", b"b", 1))
    resolve(own_bundle_folder)
    resolve(own_bundle_folder, verify_hashes=False)
    with pytest.raises(BundleError) as caught:
        resolve(own_bundle_folder, verify_hashes=True)
    assert caught.value.code == "bundle.not-as-listed"
