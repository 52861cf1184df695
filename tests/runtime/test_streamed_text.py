"""Streaming: never half a character, and nothing lost."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.checkpoints import write_tokenizer
from tests.shared_testdata import shared_testdata
from tests.thorough import examples
from vlmport.runtime.streamed_text import REPLACEMENT, TextStream

SAMPLES = (
    "a red square on a white background",
    "你好、世界。日本語のテキスト",
    "👩‍👩‍👧‍👦 and 🏳️‍🌈, e\u0301 and n\u0303, \u202bعربى\u202c",
    "  two  spaces \n\n tabs\t\tand\r\nlines",
    "\ufffd a true replacement character \ufffd",
)


def byte_fallback() -> Tokenizer:
    """Llama 2's kind: '▁' for a space, and a token for each byte that has no other."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁a", "▁the", "re", "d", "a", "é", "好"]
    tokenizer = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>")])
    return tokenizer


def metaspace() -> Tokenizer:
    """T5's kind."""
    pieces = [("<unk>", 0.0), ("▁", -2.0), ("▁a", -2.0), ("b", -2.0), ("▁▁", -3.0), ("é", -3.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


@functools.cache
def byte_level(folder: Path) -> Tokenizer:
    write_tokenizer(folder, 271)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@functools.cache
def all_tokenizers(folder: Path) -> dict[str, Tokenizer]:
    found = {
        "byte_level": byte_level(folder),
        "byte_fallback": byte_fallback(),
        "metaspace": metaspace(),
    }
    if root := shared_testdata():
        for path in sorted(root.rglob("tokenizer.json")):
            found[path.parent.name] = Tokenizer.from_file(str(path))
    return found


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizer")


def check_stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Stream ids; together the pieces are the whole decode, and no piece ends in half a one."""
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert not any(piece.endswith(REPLACEMENT) for piece in pieces)
    pieces.append(stream.finish())
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert stream.finish() == ""
    return pieces


@examples(400)
@given(data=st.data())
def test_any_tokens_stream_as_they_decode(folder: Path, data: st.DataObject):
    """Any ids at all: broken UTF-8, special tokens, runs of bytes, leading spaces."""
    tokenizers = all_tokenizers(folder)
    tokenizer = tokenizers[data.draw(st.sampled_from(sorted(tokenizers)))]
    size = tokenizer.get_vocab_size()
    low = st.integers(0, min(size, 300) - 1)  # where the bytes are
    ids = data.draw(st.lists(st.one_of(low, st.integers(0, size - 1)), max_size=24))
    check_stream(tokenizer, ids)


@examples(300)
@given(data=st.data())
def test_any_text_cut_anywhere(folder: Path, data: st.DataObject):
    """Emoji, CJK, combining marks; the last tokens may lack a part of a character."""
    tokenizers = all_tokenizers(folder)
    tokenizer = tokenizers[data.draw(st.sampled_from(sorted(tokenizers)))]
    text = data.draw(st.one_of(st.text(max_size=20), st.sampled_from(SAMPLES)))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    check_stream(tokenizer, ids[: data.draw(st.integers(0, len(ids)))])


def test_an_emoji_comes_whole(folder: Path):
    ids = byte_level(folder).encode("a👍b").ids
    assert len(ids) == 6  # four bytes between two letters
    assert check_stream(byte_level(folder), ids) == ["a", "", "", "", "👍", "b", ""]


def test_a_cut_emoji_is_given_at_the_end(folder: Path):
    ids = byte_level(folder).encode("a👍").ids[:-1]
    assert check_stream(byte_level(folder), ids) == ["a", "", "", "", REPLACEMENT]


def test_leading_space_is_stripped_once():
    tokenizer = byte_fallback()
    ids = [tokenizer.token_to_id(piece) for piece in ("▁a", "▁the", "re", "▁", "▁a")]
    assert check_stream(tokenizer, ids) == ["a", " the", "re", " ", " a", ""]


def test_a_run_of_bytes_waits_for_its_end():
    """好 and half of another: the decoder takes back the first when the second never comes."""
    tokenizer = byte_fallback()
    run = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "你你".encode()]
    d = tokenizer.token_to_id("d")
    assert check_stream(tokenizer, [*run, d])[-2:] == ["你你d", ""]
    assert check_stream(tokenizer, [*run[:4], d])[-2:] == [REPLACEMENT * 4 + "d", ""]
    skipped = tokenizer.token_to_id("</s>")
    assert "".join(check_stream(tokenizer, [*run[:3], skipped, run[3]])) == REPLACEMENT * 4


def test_special_tokens_are_skipped_and_cost_no_space():
    tokenizer = byte_fallback()
    ids = [tokenizer.token_to_id(piece) for piece in ("<s>", "▁a", "</s>", "▁the")]
    assert "".join(check_stream(tokenizer, ids)) == "a the"


def test_a_stream_that_forgets_half_characters_would_be_caught(folder: Path):
    """The naive way, decoding token by token, breaks: the test above can fail."""
    tokenizer = byte_level(folder)
    ids = tokenizer.encode("👍").ids
    assert "".join(tokenizer.decode([token]) for token in ids) != "👍"
