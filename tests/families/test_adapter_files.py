"""What was saved with an adapter counts where it says something else than the base's files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import AddedToken, Tokenizer

from tests.checkpoints import write_json, write_prefix_checkpoint
from tests.errors import raises
from tests.exporter.test_same_model import write_adapter
from tests.idefics3_checkpoints import write_idefics3_checkpoint
from tests.qwen_checkpoints import QWEN3_TEMPLATE, write_qwen2_5, write_qwen3
from vlmport.checkpoint import Checkpoint
from vlmport.errors import AdapterError, CheckpointWarning
from vlmport.exporter import export
from vlmport.families import family_of
from vlmport.families.adapter_files import with_adapter_files
from vlmport.text.tokenizer import read_tokenizer

SIDE_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "chat_template.json", "processor_config.json", "preprocessor_config.json",
    "generation_config.json",
)  # fmt: skip
TEMPLATE = QWEN3_TEMPLATE.replace("<|im_start|>", "<|im_start|>the ")


def copy(base: Path, *names: str) -> Path:
    """An adapter's folder with these files of the base, by default all that are no weights."""
    adapter = base.parent / "adapter"
    adapter.mkdir()
    for name in names or SIDE_FILES:
        if (base / name).exists():
            shutil.copyfile(base / name, adapter / name)
    return adapter


def change(path: Path, **keys: Any) -> None:
    raw = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**raw, **keys})


def read(base: Path, adapter: Path) -> tuple[Checkpoint, Any]:
    checkpoint = Checkpoint.open(base)
    return with_adapter_files(checkpoint, family_of(checkpoint), adapter)


def named(base: Path, adapter: Path, *names: str) -> tuple[Checkpoint, Any]:
    """The same, while a warning names exactly these files."""
    with pytest.warns(CheckpointWarning) as caught:
        made = read(base, adapter)
    (warning,) = (one.message for one in caught)
    assert isinstance(warning, CheckpointWarning)
    assert warning.code == "adapter.files-differ"
    assert {name for name in SIDE_FILES if repr(name) in str(warning)} == set(names)
    return made


def add_tokens(file: Path, *tokens: str) -> None:
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_special_tokens([AddedToken(one, special=True) for one in tokens])
    tokenizer.save(str(file))


@pytest.mark.parametrize("spelling", ["v4", "v5"])
@pytest.mark.parametrize("write", [write_qwen2_5, write_qwen3])
def test_the_same_saved_by_transformers_5_is_no_difference(
    tmp_path: Path, write: Callable[..., Path], spelling: str
) -> None:
    base = write(tmp_path / "base", spelling=spelling)
    adapter = tmp_path / "adapter"
    transformers.AutoTokenizer.from_pretrained(str(base)).save_pretrained(str(adapter))
    transformers.Qwen2VLImageProcessorPil.from_pretrained(str(base)).save_pretrained(str(adapter))
    checkpoint = Checkpoint.open(base)
    plain = family_of(checkpoint).hub_files()
    assert read(base, adapter)[1].hub_files() == plain


@pytest.mark.parametrize("write", [write_idefics3_checkpoint, write_prefix_checkpoint])
def test_the_same_bytes_are_no_difference(tmp_path: Path, write: Callable[..., Path]) -> None:
    base = write(tmp_path / "base")
    adapter = copy(base)
    for name in ("tokenizer_config.json", "preprocessor_config.json"):  # the order says nothing
        if (adapter / name).exists():
            raw = json.loads((adapter / name).read_text(encoding="utf-8"))
            write_json(adapter / name, dict(reversed(raw.items())))
    read(base, adapter)
    checkpoint, family = Checkpoint.open(base), family_of(Checkpoint.open(base))
    (tmp_path / "bare").mkdir()
    assert with_adapter_files(checkpoint, family, tmp_path / "bare") == (checkpoint, family)


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json"])
@pytest.mark.parametrize("spelling", ["v4", "v5"])
def test_another_template(tmp_path: Path, spelling: str, where: str) -> None:
    base = write_qwen3(tmp_path / "base", spelling=spelling)
    adapter = copy(base, "tokenizer.json", "tokenizer_config.json")
    change(adapter / "tokenizer_config.json", chat_template=None)
    if where.endswith("jinja"):
        (adapter / where).write_text(TEMPLATE, encoding="utf-8")
    else:
        change(adapter / where, chat_template=TEMPLATE)
    assert named(base, adapter, where)[1].chat_template == TEMPLATE


def test_a_tokenizers_own_template_does_not_displace_the_processors(tmp_path: Path) -> None:
    base = write_qwen3(tmp_path / "base")
    write_json(base / "chat_template.json", {"chat_template": TEMPLATE})
    adapter = copy(base, "tokenizer.json", "tokenizer_config.json")
    assert read(base, adapter)[1].chat_template == TEMPLATE


def test_tokens_that_the_embedding_has_rows_for(tmp_path: Path) -> None:
    base = write_qwen3(tmp_path / "base")
    adapter = copy(base)
    add_tokens(adapter / "tokenizer.json", "<part>")
    named_files = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    checkpoint, _ = named(base, adapter, *named_files)
    assert read_tokenizer(checkpoint.tokenizer_folder).token_to_id("<part>") is not None


def test_tokens_beyond_the_embedding(tmp_path: Path) -> None:
    base = write_qwen3(tmp_path / "base")
    adapter = copy(base)
    add_tokens(adapter / "tokenizer.json", *(f"<part {i}>" for i in range(40)))
    count = Tokenizer.from_file(str(adapter / "tokenizer.json")).get_vocab_size()
    with raises(AdapterError, "adapter.more-tokens", f"{count} tokens") as caught:
        read(base, adapter)
    assert caught.value.code == "adapter.more-tokens"
    assert f"resize_token_embeddings({count})" in (caught.value.hint or "")


def test_an_end_of_text_that_only_the_base_writes_twice(tmp_path: Path) -> None:
    """transformers 5 writes no special_tokens_map.json; the base's must not count beside it."""
    base = write_qwen3(tmp_path / "base")
    adapter = copy(base, "tokenizer.json", "tokenizer_config.json")
    change(adapter / "tokenizer_config.json", eos_token="<|video_pad|>")
    checkpoint, family = named(base, adapter, "tokenizer.json", "tokenizer_config.json")
    assert checkpoint.json("special_tokens_map.json") is None
    assert (
        read_tokenizer(checkpoint.tokenizer_folder).token_to_id("<|video_pad|>")
        in family.settings.stop_token_ids
    )


@pytest.mark.parametrize("spelling", ["v4", "v5"])
def test_smaller_images(tmp_path: Path, spelling: str) -> None:
    """The adapter's preprocessor_config.json counts even where the base wrote another file."""
    base = write_qwen3(tmp_path / "base", spelling=spelling)
    small = {"shortest_edge": 1024, "longest_edge": 4096}
    other = write_qwen3(tmp_path / "other", pixels={"size": small})
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    shutil.copyfile(other / "preprocessor_config.json", adapter / "preprocessor_config.json")
    _, family = named(base, adapter, "preprocessor_config.json")
    assert (family.pixel_config.min_pixels, family.pixel_config.max_pixels) == (1024, 4096)


def test_generation_settings(tmp_path: Path) -> None:
    base = write_qwen3(tmp_path / "base")
    adapter = copy(base, "generation_config.json")
    change(adapter / "generation_config.json", repetition_penalty=1.25)
    _, family = named(base, adapter, "generation_config.json")
    assert family.generation.defaults["repetition_penalty"] == 1.25


WRONG: dict[str, tuple[Callable[..., Path], str, dict[str, Any]]] = {
    "patches": (write_qwen3, "preprocessor_config.json", {"patch_size": 16}),
    "tiles": (
        write_idefics3_checkpoint, "preprocessor_config.json",
        {"max_image_size": {"longest_edge": 24}},
    ),
    "stop": (write_qwen3, "generation_config.json", {"eos_token_id": "x"}),
}  # fmt: skip


@pytest.mark.parametrize(("write", "file", "keys"), WRONG.values(), ids=WRONG)
def test_what_the_base_can_not_take(
    tmp_path: Path, write: Callable[..., Path], file: str, keys: dict[str, Any]
) -> None:
    base = write(tmp_path / "base")
    adapter = copy(base, file)
    change(adapter / file, **keys)
    with raises(AdapterError, "adapter.files-contradict", file) as caught:
        read(base, adapter)
    assert str(adapter) in str(caught.value)
    (adapter / file).write_text("{,}")
    with raises(AdapterError, "adapter.files-contradict", file, "JSON", "line 1"):
        read(base, adapter)


def test_they_are_written_into_the_bundle(tmp_path: Path) -> None:
    base = write_prefix_checkpoint(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base)
    shutil.copyfile(base / "tokenizer.json", adapter / "tokenizer.json")
    add_tokens(adapter / "tokenizer.json", "the s")  # of the vocabulary's last row, or one more
    with pytest.raises(AdapterError) as caught:
        export(base, tmp_path / "bundle", precisions="q8", adapter=adapter)
    assert caught.value.code == "adapter.more-tokens"
    shutil.copyfile(base / "tokenizer.json", adapter / "tokenizer.json")
    write_json(adapter / "preprocessor_config.json", {"image_mean": [0.25, 0.5, 0.5]})
    write_json(adapter / "tokenizer_config.json", {"eos_token": "<|endoftext|>", "mark": 1})
    with pytest.warns(CheckpointWarning, match="preprocessor_config"):
        bundle = export(base, tmp_path / "bundle", precisions="q8", adapter=adapter)
    written = json.loads((bundle.folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert written["image_mean"] == [0.25, 0.5, 0.5]
    written = json.loads((bundle.folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert written["mark"] == 1
