"""`vlmport chat`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmport import signals
from vlmport.builtin import ANSWERER
from vlmport.cli.answers import stripped
from vlmport.cli.app import app
from vlmport.cli.arguments import (
    Adapter,
    Device,
    ImageOptions,
    Model,
    NoSplit,
    Precision,
    Revision,
    Threads,
    VerifyHashes,
    read_image_options,
)
from vlmport.cli.console import report, say
from vlmport.cli.decoding_options import with_decoding
from vlmport.cli.opening import open_model
from vlmport.cli.output import show
from vlmport.errors import OutputError, PromptError, VlmportError, did_you_mean

if TYPE_CHECKING:
    from vlmport.runtime.conversation import Conversation

PROMPT = "> "
CHAT_PATIENCE = 60.0  # seconds: Ctrl-C stops an answer, and a long prompt takes its time
COMMANDS = {
    "/image": "/image PATH   give a picture along with the next question; without PATH: none",
    "/reset": "/reset        forget all that was said",
    "/help": "/help         this list",
    "/quit": "/quit         end, as Ctrl-D does; Ctrl-C stops an answer",
}


@app.command()
@with_decoding
def chat(
    *,
    image: Annotated[
        list[str] | None,
        typer.Option(help="A picture for the first question; can be repeated.", metavar="PATH"),
    ] = None,
    model: Model = ANSWERER,
    system: Annotated[
        str | None, typer.Option(help="A system message before all else.", metavar="TEXT")
    ] = None,
    precision: Precision = "auto",
    device: Device = "cpu",
    threads: Threads = None,
    adapter: Adapter = None,
    revision: Revision = None,
    verify_hashes: VerifyHashes = False,
    image_option: ImageOptions = None,
    no_split: NoSplit = False,
    drop_oldest: Annotated[
        bool,
        typer.Option(
            "--drop-oldest",
            help="Forget the oldest questions and answers where the context is full.",
        ),
    ] = False,
    decoding: dict[str, Any],
) -> None:
    """Talk about pictures: a line a question, from a terminal or a pipe. /help lists commands."""
    options = read_image_options(image_option, no_split)
    vlm = open_model(
        model,
        precision=precision,
        device=device,
        threads=threads,
        adapter=adapter,
        revision=revision,
        verify_hashes=verify_hashes or None,
    )
    signals.be_patient(CHAT_PATIENCE)
    with vlm:
        wanted = vlm.asker.decoding(decoding).options
        talk = Talk(
            vlm.conversation(system, image_options=options, drop_oldest=drop_oldest),
            decoding,
            streams=wanted.num_beams == wanted.num_return_sequences == 1,
        )
        for path in image or ():
            talk.conversation.attach(path)
        failure = talk.run(interactive=sys.stdin.isatty())
    if failure is not None:
        raise typer.Exit(failure.exit_code)


class Talk:
    """A conversation line by line: answers on stdout, all else on stderr."""

    def __init__(
        self, conversation: Conversation, options: Mapping[str, Any], *, streams: bool = True
    ):
        self.conversation, self.options, self.streams = conversation, options, streams

    def run(self, *, interactive: bool) -> VlmportError | None:
        """Until the input or a /quit ends it.

        On a terminal what goes wrong is said and that is all. A pipe has nobody who reads it: the
        last error is returned.
        """
        failure: VlmportError | None = None
        if interactive:
            say("/help lists commands, Ctrl-D ends", style="dim")
        for line in read_lines(interactive):
            try:
                if not self.take(line.strip()):
                    break
            except OutputError:
                raise  # nobody would read the next answer either
            except VlmportError as error:
                report(error)
                failure = error
            except KeyboardInterrupt:
                if not interactive:
                    raise
                say("stopped; the conversation is as it was")
                signals.heard()
        return None if interactive else failure

    def take(self, line: str) -> bool:
        """Do what a line says. False where it says to end. Raises VlmportError."""
        name, _, rest = line.partition(" ")
        if not line:
            return True
        if not name.startswith("/"):
            self.answer(line)
            return True
        if name not in COMMANDS:
            raise PromptError(
                f"unknown command {name}{did_you_mean(name, COMMANDS)}",
                hint="/help lists them",
                code="chat.unknown-command",
            )
        if name == "/image":
            self.picture(rest.strip())
        if name == "/reset":
            self.conversation.reset()
            say("all forgotten")
        if name == "/help":
            say("\n".join(COMMANDS.values()))
        return name != "/quit"

    def picture(self, path: str) -> None:
        """Attach a picture, or put away those that are."""
        if not path:
            self.conversation.detach()
        else:
            if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"":
                path = path[1:-1]  # as terminals paste a path with spaces
            self.conversation.attach(os.path.expanduser(path))
        count = self.conversation.attached
        say(f"{count} picture{'' if count == 1 else 's'} for the next question")

    def answer(self, question: str) -> None:
        """Ask, and print the answer as it comes."""
        before = len(self.conversation.messages)
        try:
            self._print_answer(question)
        except VlmportError as error:
            if error.code != "conversation.full":
                raise
            hint = "/reset begins a new one; `vlmport chat --drop-oldest` forgets the oldest turns"
            raise PromptError(str(error), hint=hint, code=error.code) from error
        dropped = (before + 2 - len(self.conversation.messages)) // 2
        if dropped:
            say(f"the context was full: questions forgotten, the oldest first: {dropped}")
        if self.conversation.fills_context:
            say("the answer ends where the context is full; /reset begins a new conversation")

    def _print_answer(self, question: str) -> None:
        if not self.streams:
            show(self.conversation.ask(question, **self.options).text.strip())
            return
        pieces = self.conversation.stream(question, **self.options)
        try:
            with contextlib.closing(pieces):
                for piece in stripped(pieces):
                    show(piece, end="")
        finally:
            show()


def read_lines(interactive: bool) -> Iterator[str]:
    """Lines of stdin. Only on a terminal is there a prompt, and Ctrl-C forgets the line."""
    if interactive and sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401, input() then edits lines and knows the ones before
    while True:
        try:
            line = _read_line(interactive)
        except EOFError:
            break
        except (KeyboardInterrupt, PromptError) as error:
            if not interactive or isinstance(error.__cause__, OSError):
                raise  # a terminal that is gone gives no other line
            say("")
            report(error) if isinstance(error, PromptError) else say("Ctrl-D or /quit ends")
            signals.heard()
            continue
        yield line
    if interactive:
        say("")


def _read_line(interactive: bool) -> str:
    try:
        if interactive and sys.stdout.isatty():
            return input(PROMPT)
        if interactive:  # answers go to a file, the prompt does not
            print(PROMPT, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise PromptError(
            f"the input is not {error.encoding.upper()}: {error.reason}",
            hint="convert it, or set PYTHONIOENCODING",
            code="prompt.wrong-encoding",
        ) from error
    except OSError as error:
        raise PromptError(
            f"standard input can't be read: {error.strerror or error}",
            hint="give questions in a file or a pipe: vlmport chat < questions.txt",
            code="prompt.unreadable",
        ) from error
    if not line:
        raise EOFError
    return line
