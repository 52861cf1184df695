"""Stop strings: found where Hugging Face finds them, cut from the text, never given out."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.generation.stopping_criteria import StopStringCriteria

from tests.runtime.test_streamed_text import byte_fallback, metaspace
from tests.shared_testdata import shared_testdata
from tests.thorough import examples
from vlmport.builtin import builtin_folder
from vlmport.runtime.decoding.search import Hypothesis
from vlmport.runtime.response import AnswerText
from vlmport.runtime.streamed_text import StopStrings


@functools.cache
def tokenizer_of(name: str) -> Tokenizer:
    if name == "byte_fallback":
        return byte_fallback()
    if name == "metaspace":
        return metaspace()
    folder = builtin_folder("shapes") if name == "shapes" else Path(name)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


SMOL = shared_testdata("tokenizers", "SmolVLM-256M-Instruct")
NAMES = ["shapes", "byte_fallback", "metaspace", *([str(SMOL)] if SMOL else [])]


def ids_of(data: st.DataObject, tokenizer: Tokenizer, size: int = 14) -> list[int]:
    """Random ids, or those of a text with characters of several bytes."""
    most = tokenizer.get_vocab_size() - 1
    text = data.draw(st.text(alphabet="ab é👍 .\n<", max_size=size))
    spelled = tokenizer.encode(text, add_special_tokens=False).ids
    random = data.draw(st.lists(st.integers(0, most), max_size=4))
    return [token for token in spelled + random if tokenizer.id_to_token(token) is not None]


def stops_of(data: st.DataObject, text: str) -> list[str]:
    """Parts of the text, so that they occur, and others."""
    parts = st.tuples(st.integers(0, len(text)), st.integers(1, 5)).map(
        lambda at: text[at[0] : at[0] + at[1]]
    )
    found = data.draw(st.lists(st.one_of(parts, st.text("ab .", max_size=4)), max_size=3))
    return [one for one in found if one and "\ufffd" not in one] or ["zz"]


def stopped(stops: StopStrings, ids: list[int]) -> tuple[list[int], bool]:
    """What a generation of these ids would have made."""
    for count in range(1, len(ids) + 1):
        if stops.ends(ids[:count]):
            return ids[:count], True
    return ids, False


@examples(300)
@given(data=st.data())
def test_a_stop_string_is_found_where_hugging_face_finds_it(data: st.DataObject):
    """At the first token that completes one; a byte-level vocabulary is compared byte by byte."""
    tokenizer = tokenizer_of("shapes")
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    ids = ids_of(data, tokenizer)
    strings = stops_of(data, tokenizer.decode(ids, skip_special_tokens=False))
    criteria = StopStringCriteria(theirs, strings)
    stops = StopStrings(tokenizer, strings)
    for count in range(1, len(ids) + 1):
        want = bool(criteria(torch.tensor([ids[:count]]), None)[0])
        assert stops.ends(ids[:count]) == want
        if want:
            break


@examples(200)
@given(data=st.data())
def test_no_part_of_a_stop_string_is_ever_given_out(data: st.DataObject):
    """Whatever is streamed stays a beginning of the final text; together it is that text."""
    tokenizer = tokenizer_of(data.draw(st.sampled_from(NAMES)))
    ids = ids_of(data, tokenizer)
    strings = stops_of(data, tokenizer.decode(ids, skip_special_tokens=False))
    skip = data.draw(st.booleans())
    stops = StopStrings(tokenizer, strings, skip_special_tokens=skip)
    made, ended = stopped(stops, ids)
    reason = "stop_string" if ended else "length"
    text = AnswerText(tokenizer, stops, skip_special_tokens=skip)
    answer = text.whole(Hypothesis(tuple(made), reason))
    for count in range(1, len(made)):
        text.push(tuple(made[:count]), None)
        assert answer.text.startswith(text.given)
    text.push(tuple(made), reason)
    assert text.given == answer.text
    whole = tokenizer.decode(made, skip_special_tokens=skip)
    assert whole.startswith(answer.text)
    if not ended:
        assert answer.text == whole


@pytest.mark.parametrize(
    ("text", "stop", "want"),
    [
        ("a red square", ["square"], "a red "),
        ("a red square", ["d sq"], "a re"),
        ("a red square", ["e", "red"], "a "),
        ("a red square", ["a red"], ""),
        ("a red square", ["circle"], "a red square"),
        ("on a white background", ["n a"], "o"),
    ],
)
def test_the_text_ends_before_it(text: str, stop: list[str], want: str):
    tokenizer = tokenizer_of("shapes")
    stops = StopStrings(tokenizer, stop)
    made, ended = stopped(stops, tokenizer.encode(text, add_special_tokens=False).ids)
    reason = "stop_string" if ended else "length"
    answer = AnswerText(tokenizer, stops).whole(Hypothesis(tuple(made), reason))
    assert answer.text.lstrip() == want.lstrip()
    assert answer.token_ids == tuple(made)  # the ids hold it, as Hugging Face's do


def test_what_may_become_one_is_held_back():
    """Five letters of 'square!' wait for the sixth; when that is another they come at once."""
    tokenizer = tokenizer_of("shapes")
    stops = StopStrings(tokenizer, ["squat"])
    text = AnswerText(tokenizer, stops)
    ids = [tokenizer.token_to_id(char) for char in "a squares"]
    ids = tokenizer.encode("a", add_special_tokens=False).ids
    for char in "squares":
        ids.append(tokenizer.token_to_id(char))
    pieces = [text.push(ids[:count], None) for count in range(1, len(ids) + 1)]
    assert pieces[-7:] == ["", "", "", "", "squar", "e", ""]  # the last 's' waits again
    assert text.push(ids, "length") == "s"


def test_a_special_token_may_be_part_of_one():
    """Its text is no part of what is given out, yet it ends it."""
    tokenizer = byte_fallback()
    ids = [tokenizer.token_to_id(piece) for piece in ("▁a", "▁the", "</s>", "d")]
    stops = StopStrings(tokenizer, ["the</s>"])
    made, ended = stopped(stops, ids)
    assert (made, ended) == (ids[:3], True)
    text = AnswerText(tokenizer, stops)
    pieces = [text.push(ids[:count], None) for count in (1, 2)]
    pieces.append(text.push(ids[:3], "stop_string"))
    assert "".join(pieces) == "a "
    assert AnswerText(tokenizer, stops).whole(Hypothesis(tuple(made), "stop_string")).text == "a "


def test_text_after_the_stop_string_in_one_token_is_dropped():
    tokenizer = tokenizer_of("shapes")
    token = next(
        i for i in range(349) if len(tokenizer.decode([i], skip_special_tokens=True).strip()) > 4
    )
    word = tokenizer.decode([token]).strip()
    stops = StopStrings(tokenizer, [word[1:3]])
    answer = AnswerText(tokenizer, stops).whole(Hypothesis((token,), "stop_string"))
    assert answer.text.strip() == word[0]
