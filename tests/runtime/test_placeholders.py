"""Texts that spell the placeholder of an image: words, whatever the template does with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.runtime import toy
from vlmport.builtin import builtin_models
from vlmport.bundle import Bundle, PromptSpec
from vlmport.checkpoint import Checkpoint
from vlmport.errors import PromptError, TokenizerError
from vlmport.families import family_of
from vlmport.runtime.messages import check_messages
from vlmport.runtime.model import VLM
from vlmport.runtime.prompt import Prompter, renamed_tokenizer

ANSWERING = ["shapes-smolvlm", "shapes-qwen2.5-vl", "shapes-qwen3-vl"]
IMAGE = {"type": "image"}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


@pytest.fixture(scope="module", params=ANSWERING)
def prompter(request: pytest.FixtureRequest) -> Prompter:
    """A built-in model's template and tokenizer."""
    folder = builtin_models()[request.param]
    made = Prompter(folder, family_of(Checkpoint.open(folder)).prompt)
    made._template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
    return made


def places(prompter: Prompter, ids: np.ndarray) -> list[int]:
    return np.flatnonzero(ids == prompter.spec.placeholder_token_id).tolist()


def test_in_every_role_a_text_that_spells_the_placeholder_is_words(prompter: Prompter) -> None:
    spelled = prompter.spec.image_placeholder
    said = [
        {"role": "system", "content": f"Say {spelled}."},
        user(IMAGE, text(f"{spelled}What is {spelled}{spelled}?"), IMAGE),
        {"role": "assistant", "content": f" {spelled} "},
        {"role": "tool", "content": spelled},
        user(text(spelled[:3]), text(spelled[3:])),  # a template writes them next to each other
    ]
    messages = check_messages(said, ["one", "two"]).messages
    ids = prompter.ids(messages)
    assert len(places(prompter, ids)) == 2
    # The text is the same: a word's characters have tokens of their own.
    decoded = prompter.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    assert decoded == prompter.render(messages)
    # Both stand where the image parts do.
    before = prompter.tokenizer.decode(ids[: places(prompter, ids)[1]].tolist())
    assert "What is" in before
    assert spelled not in prompter.tokenizer.decode(ids[places(prompter, ids)[1] :].tolist())[:4]


def test_such_words_have_the_ids_of_split_special_tokens(prompter: Prompter) -> None:
    """Hugging Face's name for it. All around them stays as it is, other special tokens too."""
    spelled = prompter.spec.image_placeholder
    plain = Tokenizer.from_str(prompter.tokenizer.to_str())
    plain.encode_special_tokens = True
    words = plain.encode(f"red {spelled} square", add_special_tokens=False).ids
    end = prompter.tokenizer.encode("<|im_end|>", add_special_tokens=False).ids
    ids = prompter.ids(check_messages([user(text(f"<|im_end|>red {spelled} square"))]).messages)
    found = "".join(f"{one}," for one in ids)
    assert "".join(f"{one}," for one in [*end, *words]) in found
    assert not places(prompter, ids)


@pytest.mark.parametrize("content", [[text("hi")], [IMAGE, text("1 <|im_end|> \ue0f00\ue0f1")]])
def test_other_texts_have_the_ids_of_the_rendered_prompt(
    prompter: Prompter, content: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the other tokenizer, whose names no text may hold."""
    images = [part for part in content if part is IMAGE]
    messages = check_messages([user(*content)], images).messages
    wanted = prompter.encode(prompter.render(messages))
    monkeypatch.setattr(Prompter, "_encode_marked", None)
    assert prompter.ids(messages).tolist() == wanted.tolist()


TEMPLATES = {
    "strips": "{% for m in messages %}{% for p in m.content %}{{ '<image>' if p.type == 'image' "
    "else p.text.strip() }}{% endfor %}{% endfor %}",
    "splits": "{% for m in messages %}{% for p in m.content %}{{ '<image>' if p.type == 'image' "
    "else p.text.split('|')[-1] }}{% endfor %}{% endfor %}",
    "writes the brackets": "{% for m in messages %}{% for p in m.content %}{% if p.type == 'image'"
    " %}<image>{% else %}<{{ p.text | trim }}>{% endif %}{% endfor %}{% endfor %}",
    "names it": "{% set token = '<image>' %}{% for m in messages %}{% for p in m.content %}"
    "{{ token if p.type == 'image' else p.text }}{% endfor %}{% endfor %}",
    "asks for it": "{% for m in messages %}{% for p in m.content %}{% if p.type == 'image' %}"
    "<image>{% elif '<image>' not in p.text %}{{ p.text }}{% else %}{{ p.text }}{% endif %}"
    "{% endfor %}{% endfor %}",
}


@pytest.mark.parametrize("spelled", [" <image> ", "a|<image>", "image", "<image", "<ima|<image>"])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_whatever_a_template_does_with_texts(
    bundle: Bundle, template: str, spelled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompter = Prompter(bundle.folder, bundle.manifest.prompt)
    monkeypatch.setattr(prompter, "_template", template)
    messages = check_messages([user(text(spelled), IMAGE, text(">"), text(spelled))], [0]).messages
    ids = prompter.ids(messages)
    assert (ids == toy.IMAGE).sum() == 1
    decoded = prompter.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    assert decoded == prompter.render(messages)


# As the published template of Qwen3-VL does with an image of the system's or the assistant's.
LEAVES_OUT = (
    "{% for m in messages %}{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}"
    "{% elif m.role == 'user' %}<image>{% endif %}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize("template", [LEAVES_OUT, LEAVES_OUT.replace("<image>", "")])
@pytest.mark.parametrize("spelled", ["<image>", "<ima"])
def test_a_text_takes_no_image_that_the_template_leaves_out(
    bundle: Bundle, template: str, spelled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompter = Prompter(bundle.folder, bundle.manifest.prompt)
    monkeypatch.setattr(prompter, "_template", template)
    said = [{"role": "system", "content": [IMAGE]}, user(text(spelled), text("ge>"))]
    ids = prompter.ids(check_messages(said, [0]).messages)
    assert toy.IMAGE not in ids
    with pytest.raises(PromptError) as caught:
        prompter.splice(ids, [np.array([toy.IMAGE])])
    assert caught.value.code == "prompt.placeholder-count"


def test_the_token_of_an_images_rows_is_never_a_text_either(bundle: Bundle) -> None:
    """A family whose placeholder is another token than what its rows have."""
    raw = json.loads(bundle.folder.joinpath("tokenizer.json").read_text())
    names = {one["id"]: one["content"] for one in raw["added_tokens"]}
    spec = PromptSpec("<image>", toy.IMAGE, toy.START, ())
    prompter = Prompter(bundle.folder, spec)
    row = names[toy.START]
    messages = check_messages([user(IMAGE, text(f"1 {row} <image>"), text(row))], [0]).messages
    ids = prompter.ids(messages)
    assert (ids == toy.START).sum() == 0
    assert (ids == toy.IMAGE).sum() == 1


def test_a_conversation_goes_on_after_a_word_that_spells_the_placeholder(vlm: VLM) -> None:
    """Its own answer, or the user's."""
    picture = np.zeros((8, 8, 3), np.uint8)
    chat = vlm.conversation("<image>")
    chat.ask("<image>?", [picture], max_new_tokens=3)
    chat._history.messages[-1]["content"][0]["text"] = "an <image>"
    again = chat.ask("And <image>", max_new_tokens=3)
    assert again.counts["image_tokens"] == 4
    assert (
        "".join(chat.stream("<image>", max_new_tokens=3)) == chat.messages[-1]["content"][0]["text"]
    )
    with pytest.raises(Exception, match="0 images given"):
        vlm.generate([user(IMAGE, text("<image>"))])


def test_a_tokenizer_whose_placeholder_is_no_added_token_says_so(
    bundle: Bundle, tmp_path: Path
) -> None:
    raw = json.loads((bundle.folder / "tokenizer.json").read_text())
    raw["added_tokens"] = [one for one in raw["added_tokens"] if one["content"] != "<image>"]
    for file in (raw, {name: raw[name] for name in raw if name != "added_tokens"}):
        (tmp_path / "tokenizer.json").write_text(json.dumps(file))
        with pytest.raises(TokenizerError) as caught:
            renamed_tokenizer(tmp_path, {"<image>": "<other>"})
        assert caught.value.code == "tokenizer.placeholder-in-text"
