"""The bodies of requests to /v1/chat/completions, as pydantic models.

A field that is not here is refused by name. NO_EFFECT lists fields that OpenAI's clients send and
that change nothing here; all others in this file have an effect, or one of their values is refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

# Field that a client of OpenAI's API may send → why it has no effect here.
NO_EFFECT = {
    "user": "names the caller's user, for OpenAI's abuse monitoring",
    "safety_identifier": "the newer name of `user`",
    "metadata": "labels for answers that OpenAI stores; nothing is stored here",
    "store": "whether OpenAI stores the answer; nothing is stored here",
    "service_tier": "OpenAI's price and priority",
    "prompt_cache_key": "routes requests in OpenAI's cache; ours finds equal prompts by content",
    "prompt_cache_retention": "how long OpenAI's cache keeps a prompt",
    "parallel_tool_calls": "allows several calls in an answer; an answer here has at most one",
}

Finite = Annotated[float, Field(allow_inf_nan=False)]

# Maximum lengths. A list ends at its first wrong item: an error for each would fill the memory.
MAX_MESSAGES, MAX_PARTS, MAX_TOOLS = 2000, 1000, 1000
MAX_STOPS, MAX_STOP_CHARACTERS = 16, 200  # each is looked for at each token
MAX_BIASES = 1000

StopText = Annotated[str, Field(max_length=MAX_STOP_CHARACTERS)]


class Body(BaseModel):
    """A part of a request; unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(Body):
    """A text in a message."""

    type: Literal["text"]
    text: str


class ImageUrl(Body):
    """The address of an image: data:, or http(s) where the server allows the host."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(Body):
    """An image in a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class RefusalPart(Body):
    """A refusal in an earlier answer."""

    type: Literal["refusal"]
    refusal: str


Part = Annotated[TextPart | ImagePart | RefusalPart, Field(discriminator="type")]


class FunctionCall(Body):
    """A call of a function in an earlier answer."""

    name: str
    arguments: str


class ToolCall(Body):
    """A tool call in an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class Message(Body):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class Function(Body):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    """The name of a function."""

    name: str


class NamedTool(Body):
    """The tool that has to be called."""

    type: Literal["function"]
    function: NamedFunction


class SchemaFormat(Body):
    """A JSON schema and its name."""

    name: str
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextFormat(Body):
    """An answer in plain text."""

    type: Literal["text"]


class ObjectFormat(Body):
    """An answer that is a JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Body):
    """An answer that fits a JSON schema."""

    type: Literal["json_schema"]
    json_schema: SchemaFormat


ResponseFormat = Annotated[
    TextFormat | ObjectFormat | JsonSchemaFormat, Field(discriminator="type")
]


class StreamOptions(Body):
    """What a stream holds besides the answer."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class OwnOptions(Body):
    """Options of vlmport, under the names of Hugging Face's `generate`."""

    do_sample: bool | None = None
    top_k: int | None = None
    min_p: Finite | None = None
    typical_p: Finite | None = None
    num_beams: int | None = None
    length_penalty: Finite | None = None
    early_stopping: bool | Literal["never"] | None = None
    repetition_penalty: Finite | None = None
    no_repeat_ngram_size: int | None = None
    min_new_tokens: int | None = None
    prompt_lookup_num_tokens: int | None = None
    skip_special_tokens: bool | None = None
    regex: str | None = None
    image_options: dict[str, Any] | None = None


class NoEffect(Body):
    """Fields that have no effect, see NO_EFFECT."""

    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    parallel_tool_calls: bool | None = None


class NotSupported(Body):
    """Fields of OpenAI's API that are not supported, and that clients may send as null."""

    audio: None = None
    function_call: None = None
    functions: None = None
    prediction: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None


class ChatRequest(OwnOptions, NoEffect, NotSupported):
    """The body of POST /v1/chat/completions."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: int | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: (
        StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS, fail_fast=True)] | None
    ) = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    logit_bias: (
        Annotated[
            dict[str, Annotated[Finite, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)
        ]
        | None
    ) = None
    presence_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
