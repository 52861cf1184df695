"""The command line: thin faces over the Python functions of the same names.

Data goes to stdout, progress and messages to stderr. Exit codes: 0 done, 1 a check failed
(`verify`, `inspect --probe`), 2 bad input, 130 Ctrl-C.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from vlmport import __version__
from vlmport.errors import ImageError, PromptError, VlmportError

if TYPE_CHECKING:
    from vlmport.export import Progress
    from vlmport.runtime.model import VLM
    from vlmport.verify.ladder import Progress as Climbed

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130

stdout, stderr = Console(), Console(stderr=True)


class OneLineErrors(TyperGroup):
    """Prints an error that the user can mend as one line and a hint, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except VlmportError as error:
            report(error)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            say("interrupted")
            raise typer.Exit(EXIT_INTERRUPTED) from error


app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Export small vision-language models to ONNX, prove the export right, run it anywhere.",
)

Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="Built-in name, bundle, checkpoint folder or Hub id.", metavar="SRC"
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, … as the installed ONNX Runtime offers.")]
Threads = Annotated[int | None, typer.Option(help="Threads of ONNX Runtime.", min=1)]
Adapter = Annotated[
    str | None,
    typer.Option(help="PEFT folder or Hub id, whose LoRA is merged in.", metavar="SRC"),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")]


def main() -> None:
    """The console script."""
    app(prog_name="vlmport")


def report(error: VlmportError) -> None:
    """One line, and a hint under it, on stderr."""
    message = " ".join(str(error).splitlines())
    say(f"error: {message}", style="red")
    if error.hint:
        say(f"hint: {error.hint}")


def say(text: str, style: str | None = None) -> None:
    """One line on stderr, as it is: paths may hold brackets, and only terminals wrap."""
    stderr.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


@app.callback(invoke_without_command=True)
def version_option(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"vlmport {__version__}")
        raise typer.Exit()


@app.command()
def caption(
    images: Annotated[list[Path], typer.Argument(help="Pictures.", metavar="IMAGE...")],
    model: Model = "shapes",
    precision: Annotated[
        str,
        typer.Option(
            "--precision",
            "-p",
            help="auto, fp32, q8, q4, … or vision=q8,decoder=q4.",
        ),
    ] = "auto",
    device: Device = "cpu",
    max_new_tokens: Annotated[
        int | None, typer.Option(help="At most so many tokens a caption.", min=1)
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print as it is generated.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a picture.")] = False,
    threads: Threads = None,
    adapter: Adapter = None,
    revision: Revision = None,
) -> None:
    """Caption pictures."""
    from vlmport.errors import OptionError
    from vlmport.source import load

    if stream and as_json:
        raise OptionError("--stream and --json contradict each other", hint="choose one")
    warnings.filterwarnings("ignore", module="PIL")  # what can't be read is an error of our own
    with export_progress() as progress:
        vlm = load(
            model,
            precision=precision,
            device=device,
            threads=threads,
            adapter=adapter,
            revision=revision,
            progress=progress,
        )
    options = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    with vlm:
        worst = (
            _stream_captions(vlm, images, options)
            if stream
            else _print_captions(vlm, images, options, as_json=as_json)
        )
    if worst is not None:
        raise typer.Exit(worst.exit_code)


def _print_captions(
    vlm: VLM, paths: list[Path], options: dict[str, Any], *, as_json: bool
) -> VlmportError | None:
    """A bad picture is reported and the others are captioned all the same."""
    failure: VlmportError | None = None
    for path, result in zip(paths, vlm.caption_each(paths, **options), strict=True):
        if isinstance(result, VlmportError):
            report(result)
            failure = result
        elif as_json:
            row = {"image": str(path), "caption": result.text}
            row |= {k: v for k, v in dataclasses.asdict(result).items() if k != "text"}
            print(json.dumps(row, ensure_ascii=False), flush=True)
        else:
            print(f"{path}: {result.text}" if len(paths) > 1 else result.text, flush=True)
    return failure


def _stream_captions(vlm: VLM, paths: list[Path], options: dict[str, Any]) -> VlmportError | None:
    """Caption one by one, each piece of text as it comes."""
    failure: VlmportError | None = None
    for path in paths:
        try:
            pieces = vlm.stream(path, **options)
        except (ImageError, PromptError) as error:
            report(error)
            failure = error
            continue
        print(f"{path}: " if len(paths) > 1 else "", end="")
        for piece in pieces:
            print(piece, end="", flush=True)
        print(flush=True)
    return failure


@app.command()
def export(
    source: Annotated[
        str, typer.Argument(help="Checkpoint folder, Hub id or built-in name.", metavar="SRC")
    ],
    out: Annotated[Path, typer.Argument(help="The bundle's folder.", metavar="OUT")],
    precision: Annotated[
        str, typer.Option("--precision", "-p", help="Of fp32, fp16, q8, q4, q4f16.")
    ] = "fp32,q8,q4",
    adapter: Adapter = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a bundle.")] = False,
    revision: Revision = None,
) -> None:
    """Export a checkpoint to a bundle: graphs, tokenizer, manifest, model card."""
    from vlmport.export import export as export_bundle

    with export_progress() as progress:
        bundle = export_bundle(
            source,
            out,
            precisions=precision,
            adapter=adapter,
            force=force,
            revision=revision,
            progress=progress,
        )
    size = sum(entry.size for entry in bundle.manifest.files.values())
    precisions = ", ".join(bundle.manifest.precisions)
    next_step = ["vlmport", "verify", str(out), "--reference", source]
    if adapter is not None:
        next_step += ["--adapter", adapter]
    if revision is not None:
        next_step += ["--revision", revision]
    say(f"{out}: {precisions}, {size / 1e6:.1f} MB")
    say(f"next: {shlex.join(next_step)}")


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.", metavar="BUNDLE")],
    reference: Annotated[
        str, typer.Option(help="The checkpoint that it was made from.", metavar="CHECKPOINT")
    ],
    precision: Annotated[
        str | None, typer.Option("--precision", "-p", help="Precisions, with commas.")
    ] = None,
    adapter: Adapter = None,
    images: Annotated[
        list[Path] | None, typer.Option("--image", help="A picture to add; can be repeated.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the result here.", metavar="FILE")
    ] = None,
    revision: Revision = None,
) -> None:
    """Prove a bundle right against transformers on PyTorch, rung by rung."""
    from vlmport.verify import UnrecordedError
    from vlmport.verify import verify as verify_bundle

    if json_file is not None:
        _check_writable(json_file)
    unrecorded: UnrecordedError | None = None
    with verify_progress() as progress:
        try:
            result = verify_bundle(
                bundle,
                reference,
                precisions=None if precision is None else precision.split(","),
                adapter=adapter,
                revision=revision,
                images=images,
                console=stdout,
                progress=progress,
            )
        except UnrecordedError as error:
            result, unrecorded = error.report, error
    if json_file is not None:
        _write_json(json_file, result.to_json())
    if unrecorded is not None:
        raise unrecorded
    if not result.passed:
        raise typer.Exit(EXIT_FAILED)


def _check_writable(path: Path) -> None:
    """Raise OptionError, before minutes of work, where --json can't be written."""
    from vlmport.errors import OptionError

    folder = path.absolute().parent
    if not folder.is_dir():
        raise OptionError(f"--json {path}: no folder {folder}", hint="make the folder first")
    if path.is_dir():
        raise OptionError(f"--json {path}: a folder, expected a file", hint="name a file in it")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise OptionError(f"--json {path}: not writable", hint="check its permissions")


def _write_json(path: Path, value: Any) -> None:
    """Raise OptionError where it can't be written."""
    from vlmport.errors import OptionError

    try:
        path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise OptionError(
            f"--json {path}: {error.strerror or error}", hint="is the disk full?"
        ) from error


@app.command()
def inspect(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.", metavar="BUNDLE")],
    probe: Annotated[
        bool, typer.Option("--probe", help="Check all hashes, and run the stored golden input.")
    ] = False,
    device: Device = "cpu",
) -> None:
    """Show what is in a bundle: components, inputs and outputs, sizes, parity."""
    from vlmport.bundle import Bundle
    from vlmport.inspection import describe, probe_bundle

    opened = Bundle.open(bundle, check_hashes=probe)
    describe(opened, stdout)
    if probe and not probe_bundle(opened, device, stdout):
        raise typer.Exit(EXIT_FAILED)


@app.command()
def demo(
    model: Model = "shapes",
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.", min=0, max=65535)] = 8000,
) -> None:
    """Serve a page that captions in the browser, with a model in it."""
    from vlmport.demo import make_server
    from vlmport.source import resolve

    with export_progress() as progress:
        bundle = resolve(model, progress=progress)
    server = make_server(bundle, port)
    print(server.url, flush=True)
    with contextlib.closing(server), contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


@app.command()
def models() -> None:
    """List the built-in models and the supported families."""
    from vlmport.builtin import DESCRIPTIONS
    from vlmport.families import FAMILIES

    for name, text in DESCRIPTIONS.items():
        print(f"{name}\tbuilt in: {text}")
    for family in FAMILIES:
        print(f"{family.name}\tfamily: checkpoints of model_type {', '.join(family.model_types)}")


@contextlib.contextmanager
def export_progress() -> Iterator[Progress | None]:
    """A bar on stderr that appears with the first bytes; none where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("exporting {task.description}"), BarColumn(), DownloadColumn())
    with Bar(*columns, console=stderr, transient=True) as bar:
        task = bar.add_task("", total=None, visible=False)

        def update(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what, visible=True)

        yield update


@contextlib.contextmanager
def verify_progress() -> Iterator[Climbed | None]:
    """A bar on stderr while the ladder is climbed; none where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("verifying {task.description}"), BarColumn(), MofNCompleteColumn())
    with Bar(*columns, console=stderr, transient=True) as bar:
        task = bar.add_task("", total=None, visible=False)

        def update(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what, visible=True)
            if done == total:
                bar.stop()  # the report comes now

        yield update
