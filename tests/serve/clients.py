"""Ask a server through one unmodified Python client, and print the answers as JSON.

python clients.py CLIENT URL IMAGE    (CLIENT: litellm, langchain or llm; IMAGE: a path)

It runs in a process of its own, whose packages are those of requirements-clients.txt.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

MODEL, QUESTION = "shapes-smolvlm", "What color is the square?"
SCHEMA = {
    "title": "Report",
    "type": "object",
    "properties": {"color": {"enum": ["red", "blue"]}},
    "required": ["color"],
    "additionalProperties": False,
}
TOOL = {"name": "report", "description": "Reports a color.", "parameters": SCHEMA}


def data_url(path: str) -> str:
    return "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()


def messages(path: str) -> list[Any]:
    image = {"type": "image_url", "image_url": {"url": data_url(path)}}
    return [{"role": "user", "content": [image, {"type": "text", "text": QUESTION}]}]


def ask_litellm(url: str, path: str) -> dict[str, Any]:
    """The provider `openai/` of LiteLLM, with a base of its own."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks GitHub for prices
    import litellm

    litellm.telemetry, litellm.suppress_debug_info = False, True
    to = {"model": f"openai/{MODEL}", "api_base": f"{url}/v1", "api_key": "none", "num_retries": 0}
    asked = {**to, "messages": messages(path)}
    whole: Any = litellm.completion(**asked)
    stream: Any = litellm.completion(**asked, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    form = {"type": "json_schema", "json_schema": {"name": "report", "schema": SCHEMA}}
    schema: Any = litellm.completion(**asked, response_format=form, max_tokens=100)
    tools: Any = litellm.completion(
        **asked,
        tools=[{"type": "function", "function": TOOL}],
        tool_choice={"type": "function", "function": {"name": "report"}},
        max_tokens=200,
    )
    call = tools.choices[0].message.tool_calls[0].function
    text: Any = litellm.completion(**to, messages=[{"role": "user", "content": "hello"}])
    try:
        litellm.completion(**to | {"model": "openai/none"}, messages=messages(path))
        error = None
    except litellm.NotFoundError as caught:
        error = {"status": caught.status_code, "message": str(caught)}
    usages = [usage for one in chunks if (usage := getattr(one, "usage", None)) is not None]
    return {
        "text": text.choices[0].message.content,
        "answer": whole.choices[0].message.content,
        "streamed": [one.choices[0].delta.content for one in chunks if one.choices],
        "usage": whole.usage.completion_tokens,
        "streamed_usage": usages[-1].completion_tokens,
        "schema": schema.choices[0].message.content,
        "tool": [call.name, call.arguments],
        "error": error,
    }


def ask_langchain(url: str, path: str) -> dict[str, Any]:
    """langchain-openai's ChatOpenAI."""
    from langchain_core.messages import HumanMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI
    from openai import NotFoundError

    chat = ChatOpenAI(
        model=MODEL, base_url=f"{url}/v1", api_key="none", max_retries=0, stream_usage=True
    )  # type: ignore[arg-type]
    asked = [HumanMessage(messages(path)[0]["content"])]
    whole: Any = chat.invoke(asked)
    chunks: list[Any] = list(chat.stream(asked))
    schema: Any = chat.with_structured_output(SCHEMA, method="json_schema").invoke(asked)

    @tool
    def report(color: Literal["red", "blue"]) -> str:
        """Reports a color."""
        return color

    called: Any = chat.bind_tools([report], tool_choice="report").invoke(asked, max_tokens=200)
    try:
        ChatOpenAI(model="none", base_url=f"{url}/v1", api_key="none", max_retries=0).invoke(asked)  # type: ignore[arg-type]
        error = None
    except NotFoundError as caught:
        error = {"status": caught.status_code, "message": str(caught)}
    usages = [one.usage_metadata for one in chunks if one.usage_metadata]
    return {
        "text": str(chat.invoke("hello").text),
        "answer": whole.text,
        "streamed": [str(one.text) for one in chunks],
        "usage": whole.usage_metadata["output_tokens"],
        "streamed_usage": usages[-1]["output_tokens"],
        "schema": json.dumps(schema),
        "tool": [called.tool_calls[0]["name"], json.dumps(called.tool_calls[0]["args"])],
        "error": error,
    }


def ask_llm(url: str, path: str) -> dict[str, Any]:
    """Simon Willison's llm, with the model in its extra-openai-models.yaml."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LLM_USER_PATH"] = folder
        entries = [
            f"- model_id: {name}\n  model_name: {served}\n  api_base: {url}/v1\n"
            "  vision: true\n  supports_schema: true\n  supports_tools: true\n"
            for name, served in (("here", MODEL), ("nowhere", "none"))
        ]
        Path(folder, "extra-openai-models.yaml").write_text("".join(entries))
        import llm

        def report(color: str) -> str:
            """Reports a color."""
            return color

        model = llm.get_model("here")
        image = [llm.Attachment(path=path)]
        whole = model.prompt(QUESTION, attachments=image, stream=False)
        answer = whole.text()
        streamed = list(model.prompt(QUESTION, attachments=image))
        schema = model.prompt(QUESTION, attachments=image, schema=SCHEMA, stream=False).text()
        asked = model.prompt(QUESTION, attachments=image, tools=[report], stream=False)
        try:
            llm.get_model("nowhere").prompt("hello", stream=False).text()
            error = None
        except Exception as caught:  # llm hands on what its client raises
            error = {"status": getattr(caught, "status_code", None), "message": str(caught)}
        return {
            "text": model.prompt("hello", stream=False).text(),
            "answer": answer,
            "streamed": streamed,
            "usage": whole.usage().output,
            "schema": schema,
            "offered": asked.text() or [one.name for one in asked.tool_calls()],
            "error": error,
        }


CLIENTS = {"litellm": ask_litellm, "langchain": ask_langchain, "llm": ask_llm}

if __name__ == "__main__":
    print(json.dumps(CLIENTS[sys.argv[1]](*sys.argv[2:])))
