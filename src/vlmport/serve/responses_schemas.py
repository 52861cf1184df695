"""The body of requests to /v1/responses, as pydantic models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from vlmport.serve.schemas import (
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_TOOLS,
    Body,
    Finite,
    Function,
    FunctionCall,
    ImagePart,
    ImageUrl,
    JsonSchemaFormat,
    Message,
    NamedFunction,
    NamedTool,
    NoEffect,
    ObjectFormat,
    OwnOptions,
    Part,
    SchemaFormat,
    TextFormat,
    TextPart,
    Tool,
    ToolCall,
)

LOGPROBS = "message.output_text.logprobs"


class InputText(Body):
    """A text in a message of the caller."""

    type: Literal["input_text"]
    text: str


class InputImage(Body):
    """An image in a message of the caller."""

    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto", "low", "high"] = "auto"
    file_id: None = None


class OutputText(Body):
    """A text of an earlier answer."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


Content = Annotated[InputText | InputImage | OutputText, Field(discriminator="type")]


class InputMessage(Body):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Content], Field(max_length=MAX_PARTS, fail_fast=True)]
    type: Literal["message"] = "message"
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class InputCall(Body):
    """A call of a function in an earlier answer."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class InputCallOutput(Body):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | Annotated[list[InputText], Field(max_length=MAX_PARTS, fail_fast=True)]
    id: str | None = None
    status: str | None = None


class FlatTool(Body):
    """A function that the model may call."""

    type: Literal["function"]
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FlatNamedTool(Body):
    """The function that has to be called."""

    type: Literal["function"]
    name: str


class FlatSchemaFormat(Body):
    """An answer that fits a JSON schema."""

    type: Literal["json_schema"]
    name: str
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextOptions(Body):
    """The form of the answer."""

    format: (
        Annotated[TextFormat | ObjectFormat | FlatSchemaFormat, Field(discriminator="type")] | None
    ) = None
    verbosity: Literal["medium"] | None = None


class ResponsesStreamOptions(Body):
    """What a stream holds besides the answer."""

    include_obfuscation: Literal[False] | None = None


class ResponsesRequest(OwnOptions, NoEffect):
    """The body of POST /v1/responses.

    Nothing is stored here: `previous_response_id` and `background` are refused.
    """

    model: str
    input: (
        str
        | Annotated[
            list[InputMessage | InputCall | InputCallOutput],
            Field(min_length=1, max_length=MAX_MESSAGES - 1, fail_fast=True),  # and instructions
        ]
    )
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    text: TextOptions | None = None
    tools: Annotated[list[FlatTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatNamedTool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: (
        Annotated[list[Literal["message.output_text.logprobs"]], Field(max_length=16)] | None
    ) = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    previous_response_id: None = None
    reasoning: None = None

    @property
    def reports_logprobs(self) -> bool:
        """Whether log-probabilities were asked for."""
        return LOGPROBS in (self.include or ())


def messages_of(request: ResponsesRequest) -> list[Message]:
    """Return the messages of a request in the form of chat completions."""
    messages = []
    if request.instructions is not None:
        messages.append(Message(role="system", content=request.instructions))
    if isinstance(request.input, str):
        return [*messages, Message(role="user", content=request.input)]
    for item in request.input:
        if isinstance(item, InputMessage):
            content = item.content
            parts = content if isinstance(content, str) else [_part(one) for one in content]
            messages.append(Message(role=item.role, content=parts))
        elif isinstance(item, InputCall):
            function = FunctionCall(name=item.name, arguments=item.arguments)
            call = ToolCall(id=item.call_id, function=function)
            messages.append(Message(role="assistant", tool_calls=[call]))
        else:
            output = item.output
            text = output if isinstance(output, str) else "".join(one.text for one in output)
            messages.append(Message(role="tool", content=text, tool_call_id=item.call_id))
    return messages


def _part(part: InputText | InputImage | OutputText) -> Part:
    if isinstance(part, InputImage):
        return ImagePart(
            type="image_url", image_url=ImageUrl(url=part.image_url, detail=part.detail)
        )
    return TextPart(type="text", text=part.text)


def tools_of(request: ResponsesRequest) -> list[Tool] | None:
    """Return the tools in the form of chat completions."""
    if request.tools is None:
        return None
    return [
        Tool(type="function", function=Function(**one.model_dump(exclude={"type"})))
        for one in request.tools
    ]


def tool_choice_of(
    request: ResponsesRequest,
) -> Literal["none", "auto", "required"] | NamedTool | None:
    """Return the choice of a tool in the form of chat completions."""
    choice = request.tool_choice
    if isinstance(choice, FlatNamedTool):
        return NamedTool(type="function", function=NamedFunction(name=choice.name))
    return choice


def format_of(
    request: ResponsesRequest,
) -> TextFormat | ObjectFormat | JsonSchemaFormat | None:
    """Return the form of the answer in that of chat completions."""
    form = request.text.format if request.text else None
    if isinstance(form, FlatSchemaFormat):
        schema = SchemaFormat(name=form.name, schema=form.json_schema, strict=form.strict)
        return JsonSchemaFormat(type="json_schema", json_schema=schema)
    return form
