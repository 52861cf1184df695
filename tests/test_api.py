"""The public API shows itself: signatures, documentation, options with types, short reprs."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
import typing
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vlmport
from vlmport import Bundle, Conversation, GenerateOptions, GenerationOptions, Response
from vlmport.errors import VlmportError, VlmportWarning
from vlmport.runtime.decoding.options import CHECKS
from vlmport.runtime.model import VLM

FUNCTIONS = [vlmport.load, vlmport.export, vlmport.verify, vlmport.evaluate]
METHODS = [
    VLM.open, VLM.caption, VLM.caption_each, VLM.generate, VLM.stream, VLM.conversation,
    Conversation.ask, Conversation.stream, Conversation.attach, Bundle.open,
]  # fmt: skip
GENERATING = [VLM.caption, VLM.caption_each, VLM.generate, VLM.stream]
GENERATING += [Conversation.ask, Conversation.stream]


@pytest.fixture
def vlm(tiny_bundle: Path) -> VLM:
    return VLM.open(tiny_bundle, threads=1)


def name_of(function: Any) -> str:
    return function.__qualname__


def sections(text: str) -> dict[str, str]:
    """Heading → text of the sections of a docstring, in Google's form."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if line in ("Args:", "Returns:", "Raises:"):
            lines = found.setdefault(line[:-1], [])
        elif line and not line.startswith(" "):
            lines = []
        else:
            lines.append(line)
    return {heading: "\n".join(lines) for heading, lines in found.items()}


@pytest.mark.parametrize("function", [*FUNCTIONS, *METHODS], ids=name_of)
def test_the_documentation_names_every_argument_and_what_comes_of_it(function: Any) -> None:
    text = inspect.getdoc(function)
    assert text is not None
    assert text.splitlines()[0].endswith(".")
    parts = sections(text)
    assert "Raises" in parts
    names = [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]
    for name in names:
        assert f"    {name}: " in parts["Args"] or f"    **{name}: " in parts["Args"], name
    assert "Returns" in parts or inspect.signature(function).return_annotation in (None, "None")


@pytest.mark.parametrize("function", FUNCTIONS, ids=name_of)
def test_the_documentation_has_an_example(function: Any) -> None:
    text = inspect.getdoc(function) or ""
    assert f"vlmport.{function.__name__}(" in text


@pytest.mark.parametrize("method", GENERATING, ids=name_of)
def test_options_of_generation_have_types(method: Any) -> None:
    hint = inspect.signature(method).parameters["options"]
    assert hint.kind is inspect.Parameter.VAR_KEYWORD
    assert hint.annotation == "Unpack[GenerateOptions]"


def test_keyword_arguments_are_the_fields_of_the_options() -> None:
    fields = [field.name for field in dataclasses.fields(GenerationOptions)]
    assert list(GenerateOptions.__annotations__) == fields == list(CHECKS)
    described = inspect.getdoc(GenerationOptions) or ""
    for name in fields:
        assert f"    {name}: " in described, name


def test_keyword_arguments_have_the_types_of_the_options() -> None:
    """An option takes at least its own type, and None."""
    wider = typing.get_type_hints(GenerateOptions)
    for name, kept in typing.get_type_hints(GenerationOptions).items():
        assert type(None) in typing.get_args(wider[name]), name
        for kind in typing.get_args(kept) if name != "exponential_decay_length_penalty" else ():
            simple = isinstance(kind, type) and kind in (int, float, bool, str)
            assert not simple or kind in typing.get_args(wider[name]), name
        if isinstance(kept, type) and kept in (int, float, bool, str):
            assert kept in typing.get_args(wider[name]), name


def test_every_class_of_errors_is_in_the_module_of_errors() -> None:
    kinds = [one for one in vars(vlmport.errors).values() if isinstance(one, type)]
    ours = {one.__name__ for one in kinds if issubclass(one, VlmportError | VlmportWarning)}
    assert len(ours) > 15
    assert {n for n in vlmport.__all__ if n.endswith(("Error", "Warning"))} < ours
    for name in vlmport.__all__:
        assert getattr(vlmport, name) is not None


def test_errors_need_no_import_of_their_own() -> None:
    code = "import vlmport; print(vlmport.errors.ImageError is vlmport.ImageError)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_answers_and_captions_are_responses(vlm: VLM) -> None:
    assert vlmport.Caption is Response
    caption = vlm.caption(np.zeros((20, 20, 3), np.uint8), max_new_tokens=2)
    assert type(caption) is Response
    assert str(caption) == caption.text


# repr


def test_reprs_are_short_and_say_what_it_is(tiny_bundle: Path, vlm: VLM) -> None:
    bundle = Bundle.open(tiny_bundle)
    size = sum(entry.size for entry in bundle.manifest.files.values()) / 1e6
    rest = f"family={bundle.manifest.family!r}, layout='hub', precisions=('fp32', 'q8', 'q4'), "
    assert repr(bundle) == f"Bundle({str(tiny_bundle)!r}, {rest}{size:.1f} MB)"
    name = bundle.manifest.name
    files = len(bundle.manifest.files)
    assert repr(bundle.manifest) == f"Manifest({name!r}, {rest}{files} files)"
    family = bundle.manifest.family
    assert repr(vlm) == (
        f"VLM({name!r}, family={family!r}, precision={vlm.precision!r}, device='cpu')"
    )


def test_the_repr_of_a_response_begins_with_its_text(vlm: VLM) -> None:
    black = np.zeros((20, 20, 3), np.uint8)
    caption = vlm.caption(black, max_new_tokens=3, num_beams=2, num_return_sequences=2)
    said = repr(caption)
    assert said.startswith(f"Response({caption.text!r}, stop_reason={caption.stop_reason!r}, ")
    for fact in (f"tokens={len(caption.token_ids)}", f"score={caption.score:.4f}", "seconds="):
        assert fact in said
    assert said.endswith("alternatives=1)")
    assert repr(caption.alternatives[0]).startswith("Answer('")
    assert len(repr(dataclasses.replace(caption, text="x" * 10**6))) < 400


def test_the_repr_of_a_conversation_counts_its_turns(vlm: VLM) -> None:
    black = np.zeros((20, 20, 3), np.uint8)
    chat = vlm.conversation()
    assert repr(chat) == "Conversation(questions=0, images=0, cached_tokens=0)"
    chat.attach(black)
    assert repr(chat) == "Conversation(questions=0, images=0, attached=1, cached_tokens=0)"
    chat.ask(max_new_tokens=2)
    want = f"Conversation(questions=1, images=1, cached_tokens={chat.cached_tokens})"
    assert repr(chat) == want
    assert chat.cached_tokens > 0


def test_the_repr_of_a_conversation_has_its_system_message() -> None:
    with vlmport.load("shapes-smolvlm") as model:
        chat = model.conversation("Be brief.")
        assert repr(chat).startswith("Conversation(system='Be brief.', questions=0, ")


def test_the_repr_of_options_has_those_that_differ_from_the_defaults() -> None:
    assert repr(GenerationOptions()) == "GenerationOptions()"
    options = GenerationOptions(max_new_tokens=9, stop_strings=("a",))
    assert repr(options) == "GenerationOptions(max_new_tokens=9, stop_strings=('a',))"


# warnings


def test_a_warning_names_the_line_of_the_caller(vlm: VLM) -> None:
    """However deep in vlmport it comes from."""
    black = np.zeros((20, 20, 3), np.uint8)
    for cut in (
        lambda: vlm.caption(black, regex="a{9}", max_new_tokens=1),
        lambda: vlm.caption([black], regex="a{9}", max_new_tokens=1),
        lambda: list(vlm.caption_each([black], regex="a{9}", max_new_tokens=1)),
        lambda: list(vlm.stream(black, regex="a{9}", max_new_tokens=1)),
        lambda: vlm.conversation().ask(None, [black], regex="a{9}", max_new_tokens=1),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cut()
        assert [one.filename for one in caught] == [__file__]
