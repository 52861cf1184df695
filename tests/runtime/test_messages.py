"""Keys of messages and their parts: each has its meaning, or is refused by name."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.errors import raises
from vlmport.bundle import Bundle
from vlmport.errors import ImageError, PromptError, VlmportError
from vlmport.runtime.images.reading import open_image
from vlmport.runtime.messages import check_messages
from vlmport.runtime.model import VLM
from vlmport.runtime.prompt import Prompter

PIXELS = np.arange(3 * 4 * 3, dtype=np.uint8).reshape(3, 4, 3)
OPTIONS = {"max_pixels": 5, "do_image_splitting": True}


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG")
    return file.getvalue()


ENCODED = base64.b64encode(png()).decode()
DATA = f"data:image/png;base64,{ENCODED}"


def asked(part: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [part], **more}]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a picture #1 %41.png"
    path.write_bytes(png())
    return path


@pytest.mark.parametrize(
    "part",
    [
        {"image": PIXELS},
        {"image": DATA},
        {"url": DATA},
        {"base64": ENCODED},
        {"base64": ENCODED.encode()},
        {"base64": DATA},
        {"image": None, "url": DATA, "path": None, "text": None},  # as a table's rows have it
        {"type": "image_url", "image_url": {"url": DATA, "detail": "auto"}},
        {"type": "image_url", "image_url": DATA},
    ],
    ids=str,
)
def test_a_picture_under_any_of_its_names(part: dict[str, Any]) -> None:
    chat = check_messages(asked({"type": "image", **part}))
    assert chat.messages == asked({"type": "image"})
    assert (open_image(chat.images[0]) == PIXELS).all()


def test_paths_and_their_addresses(file: Path) -> None:
    for source in (
        {"path": file},
        {"path": str(file)},
        {"url": file.as_uri()},
        {"url": file.as_uri().replace("file://", "FILE://localhost")},
        {"image": file.as_uri()},
    ):
        (image,) = check_messages(asked({"type": "image", **source})).images
        assert (open_image(image) == PIXELS).all()


def test_a_part_carries_options_of_its_own_picture(tiled: VLM) -> None:
    """Over those of the call, for this picture alone."""
    picture = np.zeros((60, 90, 3), np.uint8)
    whole = {"type": "image", "image": picture, "do_image_splitting": False}
    cut = {"type": "image", "image": picture}
    both = tiled.generate(asked(whole) + asked(cut), max_new_tokens=1)
    apart = [tiled.generate(asked(one), max_new_tokens=1) for one in (whole, cut)]
    tokens = [one.counts["image_tokens"] for one in (both, *apart)]
    assert tokens[1] < tokens[2]
    assert tokens[0] == tokens[1] + tokens[2]
    options = {"do_image_splitting": False}
    over = tiled.generate(
        asked({**cut, "do_image_splitting": True}), image_options=options, max_new_tokens=1
    )
    assert over.counts["image_tokens"] == tokens[2]


@pytest.mark.parametrize(
    ("part", "code", "named"),
    [
        ({"type": "image", "images": DATA}, "prompt.unknown-key", "did you mean 'image'?"),
        ({"type": "image", "max_pixel": 5}, "prompt.unknown-key", "did you mean 'max_pixels'?"),
        ({"type": "image", "source": {"data": ENCODED}}, "prompt.unknown-key", "'source'"),
        ({"type": "image", "resized_height": 28}, "prompt.unknown-key", "'resized_height'"),
        ({"type": "text", "text": "x", "cache_control": {"type": "x"}}, "prompt.unknown-key", ""),
        ({"type": "text", "text": "x", "image": PIXELS}, "prompt.unknown-key", "'image'"),
        ({"type": "image", "image": PIXELS, "url": DATA}, "prompt.several-images", "'url'"),
        ({"type": "image", "url": 5}, "prompt.wrong-value", "url is 5"),
        ({"type": "image", "path": PIXELS}, "prompt.wrong-value", "path"),
        ({"type": "image", "base64": "a*"}, "image.bad-base64", "b'*' at 1"),
        ({"type": "image", "base64": "abcde"}, "image.bad-base64", ""),
        ({"type": "img"}, "prompt.unknown-part", "did you mean 'image'?"),
        ({"type": "input_text", "text": "x"}, "prompt.unknown-part", ""),
        ({"type": "image_url", "image_url": {"detail": "low"}}, "prompt.wrong-value", ""),
        ({"type": "image_url", "image_url": {"uri": DATA}}, "prompt.unknown-key", "'url'"),
        ({"type": "image_url"}, "prompt.wrong-value", ""),
    ],
    ids=str,
)  # fmt: skip
def test_what_has_no_meaning_is_refused_by_name(part: Any, code: str, named: str) -> None:
    with pytest.raises(VlmportError) as caught:
        check_messages(asked(part), options=OPTIONS)
    assert caught.value.code == code
    assert named in str(caught.value)
    assert "messages[0].content[0]" in str(caught.value)


def test_a_url_beside_images_is_not_dropped(vlm: VLM) -> None:
    with pytest.raises(PromptError) as caught:
        vlm.generate(asked({"type": "image", "url": "https://a/b.png"}), [PIXELS])
    assert caught.value.code == "prompt.image-count"
    with pytest.raises(ImageError) as refused:
        vlm.generate(asked({"type": "image", "url": "https://a/b.png"}))
    assert refused.value.code == "image.url"


READS_NAMES = "{% for m in messages %}{{ m.name }}:{{ m.content[0].text }}{% endfor %}"


def test_keys_of_messages_are_those_that_the_template_reads(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompter = Prompter(bundle.folder, bundle.manifest.prompt)
    messages = check_messages(
        [{"role": "user", "content": "hi", "name": "Ann", "refusal": None, "tool_calls": []}]
    ).messages
    with pytest.raises(PromptError) as caught:
        prompter.ids(messages)
    assert caught.value.code == "prompt.unread-key"
    assert "'name'" in str(caught.value)
    assert "refusal" not in str(caught.value)
    assert "did you mean" not in str(caught.value)
    monkeypatch.setattr(prompter, "_template", READS_NAMES)
    assert prompter.tokenizer.decode(prompter.ids(messages).tolist()) == "Ann:hi"


def test_an_assistant_that_only_calls_tools_says_nothing() -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]}
    assert check_messages([called]).messages == [{**called, "content": []}]
    with raises(PromptError, "prompt.wrong-value", "messages[0]", "content", "None"):
        check_messages([{"role": "assistant", "content": None}])
