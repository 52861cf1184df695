"""Build the page from Gradio's components.

Traps:
- Gradio sends analytics and loads fonts from elsewhere unless it is told not to, and reads the
  setting when it is imported.
- Its image component encodes images again unless it is told to keep the file as it is.
- It copies uploads into a temporary folder and leaves them there: server.py gives it one of ours.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmport.app.answering import Answering
from vlmport.builtin.questions import questions
from vlmport.builtin.scenes import draw, held_out
from vlmport.errors import DependencyError, VlmportError
from vlmport.runtime.messages import Message

__all__ = ["STYLE", "Example", "build", "draw_examples", "load_gradio", "messages_of", "theme"]

TITLE = "vlmport"
FONTS = ("system-ui", "sans-serif")
MONOSPACE = ("ui-monospace", "monospace")
TOKENS, MAX_TOKENS = 128, 1024
EXAMPLES = 6
# An image in a conversation has a button that would send it to the Hub.
STYLE = '[title*="share" i], [aria-label*="share" i] { display: none !important; }'
KEPT_SECONDS = 3600  # how long uploads are kept while the page runs


@dataclass(frozen=True)
class Example:
    """A drawn scene and a question about it."""

    image: str
    question: str


def draw_examples(folder: Path) -> list[Example]:
    """Draw scenes that the built-in models were not trained on into a folder."""
    examples = []
    for number, scene in enumerate(held_out(EXAMPLES)):
        path = folder / f"scene-{number + 1}.png"
        draw(scene).save(path)
        asked = questions(scene, random.Random(number))
        examples.append(Example(str(path), asked[number % len(asked)].question))
    return examples


def load_gradio() -> Any:
    """Import Gradio, with its analytics off. Raises DependencyError where it is missing."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        return importlib.import_module("gradio")
    except ImportError as error:
        raise DependencyError(
            f"vlmport app needs the package {error.name}",
            hint="pip install 'vlmport[app]'",
            code="dependency.missing",
        ) from error


def build(answering: Answering, examples: Sequence[Example]) -> Any:
    """Return the page as Gradio's Blocks.

    Args:
        answering: what answers.
        examples: scenes that a visitor can click.

    Raises DependencyError where Gradio is not installed.
    """
    gr = load_gradio()
    with gr.Blocks(
        title=f"{TITLE}: {answering.name}",
        analytics_enabled=False,
        delete_cache=(KEPT_SECONDS, KEPT_SECONDS),
        fill_width=False,
    ) as blocks:
        gr.Markdown(lambda: _header(answering))  # a function: called for each visitor
        with gr.Tab("Caption"):
            _add_captions(gr, answering, examples)
        if answering.takes_questions:
            with gr.Tab("Chat"):
                _add_chat(gr, answering, examples)
    return blocks


def _header(answering: Answering) -> str:
    try:
        facts: Sequence[str] = [f"`{fact}`" for fact in answering.facts()]
    except VlmportError as error:
        facts = [str(error)]
    return f"# {TITLE}\n**{answering.name}** · {' · '.join(facts)}"


def theme() -> Any:
    """Return Gradio's default theme with the system's fonts, so that none is fetched."""
    return load_gradio().themes.Default(font=FONTS, font_mono=MONOSPACE)


def _add_captions(gr: Any, answering: Answering, examples: Sequence[Example]) -> None:
    with gr.Row():
        with gr.Column():
            # Without an image mode, the file is handed on as it was uploaded.
            image = gr.Image(
                type="filepath",
                image_mode=None,
                sources=["upload", "clipboard"],
                label="Image",
                height=320,
                buttons=[],
                elem_id="image",
            )
            with gr.Row():
                start = gr.Button("Caption", variant="primary")
                stop = gr.Button("Stop")
        with gr.Column():
            text = gr.Textbox(
                label="Caption", lines=6, interactive=False, buttons=["copy"], elem_id="caption"
            )
            tokens = _tokens(gr)

    def caption(path: str | None, tokens: int) -> Iterator[str]:
        if path is None:
            raise gr.Error("Choose an image first.", title="No image", duration=5)
        yield ""
        with _shown(gr):
            yield from _growing(answering.caption(path, max_new_tokens=int(tokens)))

    run = gr.on(
        [start.click],
        caption,
        [image, tokens],
        text,
        api_visibility="private",
    )
    stop.click(None, cancels=[run], api_visibility="private")
    gr.Examples(
        [[one.image] for one in examples],
        inputs=[image],
        label="Drawn scenes",
        cache_examples=False,
        api_visibility="private",
    )


def _add_chat(gr: Any, answering: Answering, examples: Sequence[Example]) -> None:
    def answer(
        message: Any, history: Sequence[Any], tokens: int, temperature: float
    ) -> Iterator[str]:
        messages, images = messages_of([*history, _as_turn(message)])
        with _shown(gr):
            yield from _growing(answering.answer(messages, images, **_chosen(tokens, temperature)))

    tokens = _tokens(gr, render=False)
    temperature = gr.Slider(
        0, 2, 0, step=0.1, label="Temperature (0: the most likely token)", render=False
    )
    gr.ChatInterface(
        answer,
        multimodal=True,
        chatbot=gr.Chatbot(
            height=420,
            buttons=["copy"],
            label=answering.name,
            allow_file_downloads=False,
            latex_delimiters=[],
            placeholder="Ask about one or several images.",
        ),
        textbox=gr.MultimodalTextbox(
            file_types=["image"],
            file_count="multiple",
            sources=["upload"],
            placeholder="Ask a question; the clip adds images",
            show_label=False,
        ),
        examples=[
            # None leaves an option as the visitor has set it.
            [{"text": one.question, "files": [one.image]}, None, None]
            for one in examples
        ],
        run_examples_on_click=True,
        cache_examples=False,
        additional_inputs=[tokens, temperature],
        additional_inputs_accordion="Options",
        flagging_mode="never",
        analytics_enabled=False,
        save_history=False,
        api_visibility="private",
    )


def _tokens(gr: Any, *, render: bool = True) -> Any:
    label = "Maximum number of new tokens"
    return gr.Slider(1, MAX_TOKENS, TOKENS, step=1, label=label, render=render)


def _chosen(tokens: int, temperature: float) -> dict[str, Any]:
    options: dict[str, Any] = {"max_new_tokens": int(tokens), "do_sample": temperature > 0}
    return options | ({"temperature": float(temperature)} if temperature > 0 else {})


def _growing(pieces: Iterator[str]) -> Iterator[str]:
    """Yield the text so far at each piece, as Gradio wants it."""
    text = ""
    try:
        for piece in pieces:
            if piece:
                text += piece
                yield text.lstrip()
    finally:
        close = getattr(pieces, "close", None)
        if close is not None:  # Stop was pressed, or the visitor has gone
            close()


@contextlib.contextmanager
def _shown(gr: Any) -> Iterator[None]:
    """Show an error of ours on the page, with its hint."""
    try:
        yield
    except VlmportError as error:
        hint = f"\n{error.hint}" if error.hint else ""
        raise gr.Error(f"{error}{hint}", title=error.code, print_exception=False) from error


def _as_turn(message: Any) -> dict[str, Any]:
    """Write what the text box gives (a text and files) as a turn of the history."""
    files = [{"type": "file", "file": {"path": one}} for one in message.get("files", ())]
    return {"role": "user", "content": [*files, {"type": "text", "text": message.get("text", "")}]}


def messages_of(history: Sequence[Mapping[str, Any]]) -> tuple[list[Message], list[str]]:
    """Translate Gradio's history into messages for `VLM.generate`, and the paths of their images.

    Turns of one role in a row are joined, and the images of a turn come before its text.
    """
    turns: list[tuple[str, list[str], list[str]]] = []
    for turn in history:
        content = turn["content"]
        if not turns or turns[-1][0] != turn["role"]:
            turns.append((turn["role"], [], []))
        _, paths, texts = turns[-1]
        for part in [content] if isinstance(content, str | Mapping) else content:
            if isinstance(part, str):
                texts.append(part)
            elif "file" in part:
                paths.append(part["file"]["path"])
            else:
                texts.append(part.get("text") or "")
    messages: list[Message] = []
    for role, paths, texts in turns:
        text = "\n".join(one for one in texts if one)
        parts: list[dict[str, Any]] = [{"type": "image"} for _ in paths]
        if text or not parts:
            parts.append({"type": "text", "text": text})
        messages.append({"role": role, "content": parts})
    return messages, [path for _, paths, _ in turns for path in paths]
