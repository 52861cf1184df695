"""Messages, templates and placeholders: what fits, and what is refused with which words."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.errors import raises
from tests.runtime import toy
from tests.shared_testdata import shared_testdata
from vlmport.bundle import PromptSpec
from vlmport.errors import PromptError, TokenizerError
from vlmport.runtime.messages import check_messages
from vlmport.runtime.prompt import Prompter
from vlmport.text.chat_template import render_template

IMAGE_PART = {"type": "image"}


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


@pytest.fixture
def prompter(bundle) -> Prompter:
    return Prompter(bundle.folder, bundle.manifest.prompt)


def test_text_becomes_a_part_and_pictures_are_filled_in_order():
    chat = check_messages(
        [
            {"role": "system", "content": "be brief"},
            user(IMAGE_PART, text_part("and"), {"type": "image", "image": "own"}, IMAGE_PART),
        ],
        ["first", "second"],
    )
    assert chat.images == ["first", "own", "second"]
    assert chat.messages[0]["content"] == [text_part("be brief")]
    assert chat.messages[1]["content"] == [IMAGE_PART, text_part("and"), IMAGE_PART, IMAGE_PART]


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ("a.png", "got 'a.png'"),
        (Path("a.png"), "got one PosixPath"),
        (toy.picture(), "got one ndarray"),
        (b"png", "got one bytes"),
    ],
)
def test_one_picture_in_place_of_a_list(images: Any, said: str):
    """Its characters or rows are not pictures."""
    with raises(PromptError, "prompt.wrong-value", "images", "list") as caught:
        check_messages([user(IMAGE_PART)], images)
    assert said in str(caught.value)
    assert caught.value.hint == "put it into a list: images=[…]"


def test_the_callers_messages_are_left_alone():
    part = {"type": "image", "image": "own"}
    check_messages([user(part)])
    assert part == {"type": "image", "image": "own"}


@pytest.mark.parametrize(
    ("messages", "images", "said"),
    [
        ([], [], "at least one message, got []"),
        ("hello", [], "must be a list"),
        ({"role": "user", "content": "x"}, [], "must be a list"),
        (["hello"], [], "messages[0]: expected role and content, got 'hello'"),
        ([{"role": "user"}], [], "messages[0]: expected role and content"),
        ([{"role": "usr", "content": "x"}], [], "role 'usr' is unknown (did you mean 'user'?)"),
        ([{"role": ["user"], "content": "x"}], [], "is unknown"),
        ([{"role": "user", "content": 3}], [], "messages[0]: content is 3"),
        ([user("x")], [], "messages[0].content[0]: expected a text or an image part, got 'x'"),
        ([user({"type": "video"})], [], "expected a text or an image part"),
        ([user(text_part("a\udcffb"))], [], "messages[0].content[0]: not Unicode at character 1"),
        (
            [user(IMAGE_PART), {"role": "user", "content": "\ud800"}],
            ["a"],
            "messages[1].content[0]",
        ),
        ([user({"type": "text"})], [], "expected a text or an image part"),
        ([user({"type": "image", "image": None})], [], "its image is None"),
        ([user({"type": "image_url", "image_url": {}})], [], "image_url without a url"),
        ([user(IMAGE_PART)], [], "0 images given, 1 image part without"),
        ([user(text_part("x"))], ["a"], "1 image given, 0 image parts without"),
        ([user(IMAGE_PART)], ["a", "b"], "2 images given, 1 image part"),
    ],
)
def test_bad_messages(messages: Any, images: list[str], said: str):
    with pytest.raises(PromptError) as caught:
        check_messages(messages, images)
    assert said in str(caught.value)
    assert caught.value.hint


def test_rendering_and_encoding(prompter: Prompter):
    chat = check_messages([user(text_part("hi "), IMAGE_PART)], ["picture"])
    text = prompter.render(chat.messages)
    assert text == "user:hi <image>\nassistant:"
    ids = prompter.encode(text)
    assert (ids == toy.IMAGE).sum() == 1
    assert prompter.tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text
    assert prompter.render(chat.messages, add_generation_prompt=False) == "user:hi <image>\n"


def test_nothing_is_added_to_the_prompt(bundle, tmp_path: Path):
    """No BOS, also where the tokenizer's own post-processor would add one; no truncation."""
    raw = json.loads((bundle.folder / "tokenizer.json").read_text())
    raw["truncation"] = {
        "max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right",
    }  # fmt: skip
    begin = {"SpecialToken": {"id": "B", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, second],
        "special_tokens": {"B": {"id": "B", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    prompter = Prompter(tmp_path, bundle.manifest.prompt)
    assert prompter.tokenizer.encode("abc").ids[0] == 0
    assert len(prompter.encode("a c e")) == 5
    assert 0 not in prompter.encode("abc")


@given(data=st.data())
def test_splicing(data: st.DataObject):
    """Every placeholder gives way to its picture's ids, which may hold the placeholder's id."""
    token = 7
    spec = PromptSpec("<image>", token, token, ())
    prompter = object.__new__(Prompter)
    prompter.spec = spec
    ids = data.draw(st.lists(st.integers(5, 9), max_size=12))
    count = ids.count(token)
    images = data.draw(
        st.lists(st.lists(st.integers(5, 9), max_size=4), min_size=count, max_size=count)
    )
    rest, want = iter(images), []
    for one in ids:
        want += next(rest) if one == token else [one]
    got = prompter.splice(np.array(ids, np.int64), [np.array(i, np.int64) for i in images])
    assert got.tolist() == want
    assert got.dtype == np.int64


def test_pictures_without_placeholders(prompter: Prompter):
    ids = prompter.encode("user:<image><image>")
    with raises(PromptError, "prompt.placeholder-count", "1", "2", "'<image>'") as caught:
        prompter.splice(ids, [np.array([1])])
    assert caught.value.code == "prompt.placeholder-count"
    with raises(
        PromptError, "prompt.placeholder-count", "3 images", "2 placeholders", "'<image>'"
    ) as caught:
        prompter.splice(ids, [np.array([1])] * 3)
    assert caught.value.code == "prompt.placeholder-count"


def render(template: str, **values: Any) -> str:
    return render_template(template, **values)


LOOP = "{% for i in [1, 2, 3] %}"


@pytest.mark.parametrize(
    ("template", "want"),
    [
        ("{% if true %}\n  x\n{% endif %}\n", "  x\n"),
        ("{{ {'a': '<b>é'} | tojson }}", '{"a": "<b>é"}'),
        ("{{ [1, 2] | tojson(indent=1) }}", "[\n 1,\n 2\n]"),
        (LOOP + "{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("{% generation %}a{{ 1 }}{% endgeneration %}c", "a1c"),
        ("{% set n = namespace(x=0) %}" + LOOP + "{% set n.x = i %}{% endfor %}{{ n.x }}", "3"),
        ("{{ strftime_now('%Y') }}", str(datetime.now().year)),
        ("{{ dict(a=1)['a'] }}", "1"),
        ("{{ dict.fromkeys(['a', 'b'], 2)['b'] }}", "2"),
    ],
)
def test_the_template_language_is_that_of_transformers(template: str, want: str):
    assert render_template(template) == want


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no pictures here') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].foo.bar }}",
        "{{ 1 + 'a' }}",
        "{% if %}",
        "{% set n = namespace(__class__=1) %}",
        "{{ range(999999999) | list }}",
    ],
)
def test_a_template_that_fails_or_reaches_out(bundle, tmp_path: Path, template: str):
    prompter = own_prompter(bundle, tmp_path, {"chat_template": template})
    with raises(PromptError, "template.refuses") as caught:
        prompter.render([user(text_part("x"))])
    assert caught.value.hint
    if "raise" in template:
        assert "no pictures here" in str(caught.value)


def own_prompter(bundle, folder: Path, config: dict[str, Any]) -> Prompter:
    (folder / "tokenizer.json").write_bytes((bundle.folder / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Prompter(folder, bundle.manifest.prompt)


def test_where_the_template_comes_from(bundle, tmp_path: Path):
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert own_prompter(bundle, tmp_path, {"chat_template": named}).render([]) == "d"
    with raises(PromptError, "template.missing"):
        own_prompter(bundle, tmp_path, {}).render([])
    (tmp_path / "chat_template.jinja").write_text("file {{ bos_token }}")
    config = {"bos_token": {"content": "<s>", "special": True}}
    assert own_prompter(bundle, tmp_path, config).render([]) == "file <s>"


def test_tokenizer_files_that_are_missing_or_broken(bundle, tmp_path: Path):
    with raises(TokenizerError, "tokenizer.missing-file", "tokenizer.json") as caught:
        Prompter(tmp_path, bundle.manifest.prompt)
    assert caught.value.hint == "download or export the bundle again"
    (tmp_path / "tokenizer.json").write_text("{}")
    with raises(TokenizerError, "tokenizer.unreadable", "tokenizer.json") as caught:
        Prompter(tmp_path, bundle.manifest.prompt)
    assert caught.value.hint
    (tmp_path / "tokenizer.json").write_bytes((bundle.folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("{")
    with raises(TokenizerError, "source.not-json", "tokenizer_config.json"):
        Prompter(tmp_path, bundle.manifest.prompt)
    for value, said in {
        "[]": r"tokenizer_config\.json: expected a JSON object, got a list",
        '{"chat_template": [{"name": "default"}]}': "no readable chat template: 'template'",
        '{"chat_template": ["x"]}': "no readable chat template",
        '{"chat_template": 5}': "chat_template is 5",
    }.items():
        (tmp_path / "tokenizer_config.json").write_text(value)
        with pytest.raises(TokenizerError, match=said):
            Prompter(tmp_path, bundle.manifest.prompt)
    for bad in ("true", "3", '["</s>"]', '{"content": false}'):
        (tmp_path / "tokenizer_config.json").write_text(f'{{"bos_token": {bad}}}')
        with pytest.raises(TokenizerError) as caught:
            Prompter(tmp_path, bundle.manifest.prompt)
        assert caught.value.code == "tokenizer.special-token-type"
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with raises(TokenizerError, "template.unreadable", "utf-8"):
        Prompter(tmp_path, bundle.manifest.prompt)


@pytest.mark.parametrize(
    ("name", "placeholder", "want"),
    [
        (
            "SmolVLM-256M-Instruct",
            "<image>",
            "<|im_start|>User:<image>What?<end_of_utterance>\nAssistant:",
        ),
        (
            "Qwen2.5-VL",
            "<|image_pad|>",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            "<|vision_start|><|image_pad|><|vision_end|>What?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "Qwen3-VL",
            "<|image_pad|>",
            "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What?<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
    ],
)
def test_real_templates(name: str, placeholder: str, want: str):
    folder = shared_testdata("tokenizers", name)
    if folder is None:
        pytest.skip("no shared test data")
    prompter = Prompter(folder, PromptSpec(placeholder, 0, 0, ()))
    token = prompter.tokenizer.token_to_id(placeholder)
    assert token is not None
    chat = check_messages([user(IMAGE_PART, text_part("What?"))], ["picture"])
    text = prompter.render(chat.messages)
    assert text == want
    assert (prompter.encode(text) == token).sum() == 1
