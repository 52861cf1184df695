"""/caption: an image in each of its forms gives {"caption": …}."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

import vlmport
from tests.serve.conftest import RED_SQUARE
from tests.serve.running import Running

RED = "a red square on a white background"


def test_the_forms_of_an_image(server: Running, red_square: str) -> None:
    image = RED_SQUARE.read_bytes()
    in_base64 = base64.b64encode(image).decode()
    forms: list[dict[str, Any]] = [
        {"files": {"image": ("red.png", image, "image/png")}},
        {"files": {"file": image}, "data": {"model": "shapes"}},
        {"content": image, "headers": {"content-type": "image/png"}},
        {"content": image},
        {"content": image, "headers": {"content-type": "application/octet-stream"}},
        {"json": {"image": in_base64}},
        {"json": {"image": red_square}},
    ]
    with server.http() as client:
        for form in forms:
            response = client.post("/caption?model=shapes", **form)
            assert response.status_code == 200, response.text
            assert response.json() == {"caption": RED}
        assert "red" in client.post("/caption", content=image).json()["caption"]


def test_options_are_those_of_generate(server: Running) -> None:
    with vlmport.load("shapes", threads=1) as model:
        expected = model.caption(RED_SQUARE, num_beams=3, max_new_tokens=3).text.strip()
    with server.http() as client:
        query = "/caption?model=shapes&num_beams=3&max_new_tokens=3"
        found = client.post(query, content=RED_SQUARE.read_bytes()).json()
    assert found == {"caption": expected}


def test_several_files_are_a_batch_and_a_bad_one_has_its_error(
    server: Running, tmp_path: Path
) -> None:
    image = RED_SQUARE.read_bytes()
    files = [("images", (f"{n}.png", image)) for n in range(10)]
    files.insert(3, ("images", ("bad.png", b"no image")))
    with server.http() as client:
        body = client.post("/caption?model=shapes", files=files).json()
    names = [one["file"] for one in body["captions"]]
    assert names == [name for _, (name, _) in files]
    bad = body["captions"].pop(3)
    assert bad["error"]["code"] == "image.not-a-picture"
    assert [one["caption"] for one in body["captions"]] == [RED] * 10


@pytest.mark.parametrize(
    ("form", "status", "code"),
    [
        ({"content": b"no image"}, 400, "image.not-a-picture"),
        ({"content": b""}, 400, None),
        ({"json": {"image": "%%%"}}, 400, "image.bad-base64"),
        ({"json": {"picture": "aGk="}}, 400, "server.unknown-field"),
        ({"json": {"image": "https://example.com/a.png"}}, 400, "image.url-not-allowed"),
        ({"json": {"image": "file:///etc/passwd"}}, 400, "image.url-invalid"),
        ({"data": {"model": "shapes"}}, 415, "server.wrong-content-type"),
        ({"files": {"image": b"x"}, "params": {"beams": 3}}, 400, "server.unknown-field"),
        ({"content": b"x", "params": {"num_beams": "many"}}, 400, "server.wrong-value"),
        ({"content": b"x", "params": {"model": "shape"}}, 404, "server.unknown-model"),
        ({"content": b"x", "headers": {"content-type": "text/plain"}}, 415, None),
    ],
)
def test_bad_images(server: Running, form: dict[str, Any], status: int, code: str | None) -> None:
    with server.http() as client:
        response = client.post("/caption", **form)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert code is None or error["code"] == code
    assert error["message"]
