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
    Precision,
    Revision,
    Threads,
    Tune,
    VerifyHashes,
    read_image_options,
)
from vlmport.cli.console import report, say
from vlmport.cli.decoding_options import GeneratingCommand, decoding_of
from vlmport.cli.opening import open_model
from vlmport.cli.output import show
from vlmport.errors import OutputError, PromptError, VlmportError, did_you_mean

if TYPE_CHECKING:
    from vlmport.runtime.conversation import Conversation

PROMPT = "> "
CHAT_PATIENCE = 60.0  # seconds: Ctrl-C stops an answer, and a long prompt takes its time
COMMANDS = {
    "/image": "/image PATH   attach an image to the next question; without PATH, remove all",
    "/reset": "/reset        forget the conversation",
    "/help": "/help         show this list",
    "/quit": "/quit         end (Ctrl-D too); Ctrl-C stops an answer",
}


@app.command(cls=GeneratingCommand)
def chat(
    ctx: typer.Context,
    *,
    image: Annotated[
        list[str] | None,
        typer.Option(help="Image for the first question; can be repeated.", metavar="PATH"),
    ] = None,
    model: Model = ANSWERER,
    system: Annotated[
        str | None, typer.Option(help="System message before the first question.", metavar="TEXT")
    ] = None,
    precision: Precision = "auto",
    device: Device = "auto",
    threads: Threads = None,
    tune: Tune = True,
    adapter: Adapter = None,
    revision: Revision = None,
    verify_hashes: VerifyHashes = False,
    image_option: ImageOptions = None,
    drop_oldest: Annotated[
        bool,
        typer.Option(
            "--drop-oldest",
            help="Forget the oldest questions and answers when the context is full.",
        ),
    ] = False,
) -> None:
    """Hold a conversation about images.

    Each line of the input, a terminal or a pipe, is a question. A line that begins with / is a
    command; /help lists them.
    """
    options, decoding = read_image_options(image_option), decoding_of(ctx)
    vlm = open_model(
        model,
        precision=precision,
        device=device,
        threads=threads,
        tune=tune,
        adapter=adapter,
        revision=revision,
        verify_hashes=verify_hashes or None,
    )
    signals.be_patient(CHAT_PATIENCE)
    with vlm:
        wanted = vlm.preparer.decoding(decoding).options
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
    """A conversation line by line: answers go to stdout, messages to stderr."""

    def __init__(
        self, conversation: Conversation, options: Mapping[str, Any], *, streams: bool = True
    ):
        self.conversation, self.options, self.streams = conversation, options, streams

    def run(self, *, interactive: bool) -> VlmportError | None:
        """Answer lines until the input ends, or until /quit.

        Errors are printed. From a pipe, the last of them is returned too, for the exit code.
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
                say("stopped; the conversation is as it was before the question")
                signals.heard()
        return None if interactive else failure

    def take(self, line: str) -> bool:
        """Run a line: a question or a command. Returns False for /quit. Raises VlmportError."""
        name, _, rest = line.partition(" ")
        if not line:
            return True
        if not name.startswith("/"):
            self.answer(line)
            return True
        if name not in COMMANDS:
            raise PromptError(
                f"unknown command {name}{did_you_mean(name, COMMANDS)}",
                hint="/help lists the commands",
                code="chat.unknown-command",
            )
        if name == "/image":
            self.attach(rest.strip())
        if name == "/reset":
            self.conversation.reset()
            say("the conversation is forgotten")
        if name == "/help":
            say("\n".join(COMMANDS.values()))
        return name != "/quit"

    def attach(self, path: str) -> None:
        """Attach an image, or without a path remove those that are attached."""
        if not path:
            self.conversation.detach()
        else:
            if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"":
                path = path[1:-1]  # as terminals paste a path with spaces
            self.conversation.attach(os.path.expanduser(path))
        count = self.conversation.attached
        say(f"{count} image{'' if count == 1 else 's'} attached to the next question")

    def answer(self, question: str) -> None:
        """Ask, and print the answer as it comes."""
        before = len(self.conversation.messages)
        try:
            self._print_answer(question)
        except VlmportError as error:
            if error.code != "conversation.full":
                raise
            hint = "/reset starts a new one; `vlmport chat --drop-oldest` forgets the oldest turns"
            raise PromptError(str(error), hint=hint, code=error.code) from error
        dropped = (before + 2 - len(self.conversation.messages)) // 2
        if dropped:
            say(f"the context was full: questions forgotten, the oldest first: {dropped}")
        if self.conversation.fills_context:
            say("the context is full, so the answer was cut; /reset starts a new conversation")

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
    """Read lines of stdin. On a terminal, show a prompt, and let Ctrl-C forget the line."""
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
                raise  # a terminal that is closed gives no other line
            say("")
            report(error) if isinstance(error, PromptError) else say(
                "Ctrl-D or /quit ends the conversation"
            )
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
            hint="convert the input to UTF-8, or set PYTHONIOENCODING",
            code="prompt.wrong-encoding",
        ) from error
    except OSError as error:
        raise PromptError(
            f"standard input can't be read: {error.strerror or error}",
            hint="give questions from a file or a pipe: vlmport chat < questions.txt",
            code="prompt.unreadable",
        ) from error
    if not line:
        raise EOFError
    return line
