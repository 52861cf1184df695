"""/v1/chat/completions, asked by the unmodified openai client."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai.types import Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

import vlmport
from tests.serve.conftest import RED_SQUARE
from tests.serve.running import Running
from tests.serve.strict import validated

MODEL = "shapes-smolvlm"


def question(image: str, text: str = "What color is the square?") -> list[Any]:
    parts = [
        {"type": "image_url", "image_url": {"url": image}},
        {"type": "text", "text": text},
    ]
    return [{"role": "user", "content": parts}]


def posted(server: Running, **body: Any) -> dict[str, Any]:
    with server.http() as client:
        response = client.post("/v1/chat/completions", json={"model": MODEL, **body})
    assert response.status_code == 200, response.text
    return response.json()


def streamed(server: Running, **body: Any) -> list[dict[str, Any]]:
    with server.http() as client:
        asked = {"model": MODEL, "stream": True, **body}
        response = client.post("/v1/chat/completions", json=asked)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@pytest.fixture(scope="module")
def answer(red_square: str) -> str:
    with vlmport.load(MODEL, threads=1) as model:
        message = [
            {
                "role": "user",
                "content": [
                    {"type": "image"},
                    {"type": "text", "text": "What color is the square?"},
                ],
            }
        ]
        return model.generate(message, [RED_SQUARE]).text


def test_models_are_listed(server: Running) -> None:
    client = server.openai()
    assert [one.id for one in client.models.list()] == [MODEL, "shapes"]
    assert client.models.retrieve("shapes").owned_by == "vlmport"
    with server.http() as http:
        for one in http.get("/v1/models").json()["data"]:
            validated(Model, one)
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("shape")
    assert caught.value.code == "server.unknown-model"
    assert "'shapes'" in caught.value.message


def test_an_answer_is_that_of_generate(server: Running, red_square: str, answer: str) -> None:
    body = posted(server, messages=question(red_square))
    found = validated(ChatCompletion, body)
    assert found.choices[0].message.content == answer
    assert found.choices[0].finish_reason == "stop"
    assert found.usage is not None
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    assert body["usage"]["prompt_tokens_details"]["image_tokens"] > 0
    again = posted(server, messages=question(red_square))
    assert again["choices"] == body["choices"]
    assert again["id"] != body["id"]
    assert again["system_fingerprint"] == body["system_fingerprint"]


def test_a_stream_has_the_same_answer(server: Running, red_square: str, answer: str) -> None:
    asked = {"messages": question(red_square), "logprobs": True, "top_logprobs": 2}
    chunks = streamed(server, **asked, stream_options={"include_usage": True})
    *rest, last = [validated(ChatCompletionChunk, one) for one in chunks]
    assert "".join(one.choices[0].delta.content or "" for one in rest) == answer
    assert rest[0].choices[0].delta.role == "assistant"
    assert rest[-1].choices[0].finish_reason == "stop"
    whole = validated(ChatCompletion, posted(server, **asked))
    assert last.choices == []
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert {one.usage for one in rest} == {None}
    tokens = [
        token.model_dump()
        for one in rest
        if one.choices[0].logprobs
        for token in one.choices[0].logprobs.content or ()
    ]
    assert whole.choices[0].logprobs is not None
    assert tokens == [one.model_dump() for one in whole.choices[0].logprobs.content or ()]
    assert b"".join(bytes(one["bytes"]) for one in tokens).decode() == answer
    assert all(len(one["top_logprobs"]) == 2 for one in tokens)


def test_without_include_usage_no_chunk_has_it(server: Running, red_square: str) -> None:
    assert not any("usage" in one for one in streamed(server, messages=question(red_square)))


def test_several_answers(server: Running, red_square: str) -> None:
    sampled = {
        "messages": question(red_square),
        "n": 3,
        "temperature": 2,
        "seed": 5,
        "max_tokens": 8,
    }
    body = posted(server, **sampled)
    found = validated(ChatCompletion, body)
    texts = [one.message.content for one in found.choices]
    assert [one.index for one in found.choices] == [0, 1, 2]
    chunks = [validated(ChatCompletionChunk, one) for one in streamed(server, **sampled)]
    for index, text in enumerate(texts):
        own = [one.choices[0] for one in chunks if one.choices[0].index == index]
        assert "".join(one.delta.content or "" for one in own) == text
        assert own[-1].finish_reason == found.choices[index].finish_reason
    with vlmport.load(MODEL, threads=1) as model:
        message = [
            {
                "role": "user",
                "content": [
                    {"type": "image"},
                    {"type": "text", "text": "What color is the square?"},
                ],
            }
        ]
        offline = model.generate(
            message,
            [RED_SQUARE],
            do_sample=True,
            temperature=2.0,
            top_k=0,
            seed=5,
            num_return_sequences=3,
            max_new_tokens=8,
        )
    assert texts == [one.text for one in (offline, *offline.alternatives)]
    greedy = posted(server, messages=question(red_square), n=2)
    assert len({one["message"]["content"] for one in greedy["choices"]}) == 1
    beams = posted(server, messages=question(red_square), n=2, num_beams=3)
    assert len({one["message"]["content"] for one in beams["choices"]}) == 2


def test_stop_strings_and_length(server: Running, red_square: str) -> None:
    captioned = question(red_square, "Describe the picture.")
    whole = posted(server, messages=captioned)["choices"][0]
    text = whole["message"]["content"]
    words = text.split()
    cut = posted(server, messages=captioned, stop=[words[2]])["choices"][0]
    assert cut["finish_reason"] == "stop"
    assert cut["message"]["content"] == text[: text.index(words[2])]
    short = posted(server, messages=captioned, max_completion_tokens=2)["choices"][0]
    assert short["finish_reason"] == "length"
    assert text.startswith(short["message"]["content"])


def test_biases_and_penalties_change_the_answer(server: Running, red_square: str) -> None:
    asked = {"messages": question(red_square), "logprobs": True}
    plain = posted(server, **asked)["choices"][0]
    with vlmport.load(MODEL, threads=1) as model:
        token = model.prompter.tokenizer.encode(plain["message"]["content"]).ids[0]
    biased = posted(server, **asked, logit_bias={str(token): -100})["choices"][0]
    assert biased["message"]["content"] != plain["message"]["content"]
    for name in ("presence_penalty", "frequency_penalty"):
        posted(server, **asked, **{name: 1.5})


def test_detail_sets_the_options_of_the_image(server: Running, red_square: str) -> None:
    def tokens(detail: str) -> int:
        messages = question(red_square)
        messages[0]["content"][0]["image_url"]["detail"] = detail
        return posted(server, messages=messages)["usage"]["prompt_tokens"]

    assert tokens("low") < tokens("high") == tokens("auto")


def test_a_conversation_reuses_its_prompt(server: Running, red_square: str) -> None:
    messages = question(red_square)
    first = posted(server, messages=messages)
    content = first["choices"][0]["message"]["content"]
    messages += [
        {"role": "assistant", "content": content},
        {"role": "user", "content": "How many squares are there?"},
    ]
    second = posted(server, messages=messages)
    details = second["usage"]["prompt_tokens_details"]
    assert 0 < details["cached_tokens"] < second["usage"]["prompt_tokens"]
    assert details["image_tokens"] == first["usage"]["prompt_tokens_details"]["image_tokens"]


def test_images_are_kept_from_one_connection_to_the_next(server: Running, red_square: str) -> None:
    def encoded() -> float:
        with server.http() as client:
            lines = client.get("/metrics").text.splitlines()
        name = f'vlmport_images_encoded_total{{model="{MODEL}"}} '
        return next(float(one.removeprefix(name)) for one in lines if one.startswith(name))

    posted(server, messages=question(red_square))
    before = encoded()
    posted(server, messages=question(red_square, "How many squares are there?"))
    assert encoded() == before
