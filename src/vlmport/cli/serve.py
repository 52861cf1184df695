"""`vlmport serve`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from vlmport import signals
from vlmport.builtin import ANSWERER
from vlmport.cli.app import SectionedCommand, app
from vlmport.cli.arguments import Device, Precision, Threads
from vlmport.cli.console import say
from vlmport.cli.output import show
from vlmport.errors import DependencyError

LISTEN, ACCESS, LIMITS, CAPACITY = "Listen", "Access", "Limits", "Capacity"
MEGABYTE = 1_000_000


@app.command(cls=SectionedCommand)
def serve(
    *,
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Built-in names, bundles, checkpoint folders or Hub ids "
            f"(default: {ANSWERER}); NAME=SRC gives one a name in the API.",
            metavar="[MODEL]...",
        ),
    ] = None,
    host: Annotated[
        str,
        typer.Option(help="Address to listen on; 0.0.0.0 is all.", rich_help_panel=LISTEN),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(help="Port; 0 takes a free one.", min=0, max=65535, rich_help_panel=LISTEN),
    ] = 8000,
    grace: Annotated[
        float,
        typer.Option(
            help="Seconds that running requests may go on after SIGTERM.",
            min=0,
            rich_help_panel=LISTEN,
        ),
    ] = 30.0,
    log_json: Annotated[
        bool,
        typer.Option("--log-json", help="Log lines in JSON.", rich_help_panel=LISTEN),
    ] = False,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="File with one key a line; a request has to give one of them.",
            metavar="FILE",
            rich_help_panel=ACCESS,
        ),
    ] = None,
    no_auth: Annotated[
        bool,
        typer.Option(
            "--no-auth",
            help="Serve other machines without a key.",
            rich_help_panel=ACCESS,
        ),
    ] = False,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Further name of this server in the Host header; can be repeated.",
            metavar="NAME",
            rich_help_panel=ACCESS,
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Origin whose web pages may call this server; can be repeated.",
            metavar="ORIGIN",
            rich_help_panel=ACCESS,
        ),
    ] = None,
    allow_images_from: Annotated[
        list[str] | None,
        typer.Option(
            help="Host that images may be fetched from; can be repeated. example.com, "
            "*.example.com, or * for all public ones (default: none).",
            metavar="HOST",
            rich_help_panel=ACCESS,
        ),
    ] = None,
    max_body_mb: Annotated[
        float,
        typer.Option(help="Size of the body of a request.", min=0.001, rich_help_panel=LIMITS),
    ] = 20.0,
    max_images: Annotated[
        int, typer.Option(help="Images in a request.", min=0, rich_help_panel=LIMITS)
    ] = 16,
    max_image_mb: Annotated[
        float, typer.Option(help="Size of an image file.", min=0.001, rich_help_panel=LIMITS)
    ] = 20.0,
    max_characters: Annotated[
        int,
        typer.Option(help="Characters of all texts in a request.", min=1, rich_help_panel=LIMITS),
    ] = 400_000,
    max_answers: Annotated[
        int, typer.Option(help="Answers to one request (n).", min=1, rich_help_panel=LIMITS)
    ] = 8,
    body_seconds: Annotated[
        float,
        typer.Option(help="Time to send the body of a request.", min=0.1, rich_help_panel=LIMITS),
    ] = 30.0,
    time_limit: Annotated[
        float,
        typer.Option(
            help="Seconds from a request to the end of its answer.",
            min=0.1,
            rich_help_panel=LIMITS,
        ),
    ] = 300.0,
    max_models: Annotated[
        int,
        typer.Option(
            help="Models that are open at a time; the least recently used is closed.",
            min=1,
            rich_help_panel=CAPACITY,
        ),
    ] = 2,
    preload: Annotated[
        bool,
        typer.Option(
            "--preload",
            help="Open models at the start, not at their first use.",
            rich_help_panel=CAPACITY,
        ),
    ] = False,
    max_running: Annotated[
        int,
        typer.Option(
            help="Answers that a model generates at a time.", min=1, rich_help_panel=CAPACITY
        ),
    ] = 16,
    max_queue: Annotated[
        int,
        typer.Option(
            help="Requests that wait for a model; further ones get status 429.",
            min=0,
            rich_help_panel=CAPACITY,
        ),
    ] = 64,
    cache_mb: Annotated[
        float,
        typer.Option(
            help="Size of cached images and prompts of a model.", min=0, rich_help_panel=CAPACITY
        ),
    ] = 256.0,
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder that keeps cached images and prompts for the next start.",
            metavar="DIR",
            rich_help_panel=CAPACITY,
        ),
    ] = None,
    cache_dir_mb: Annotated[
        float,
        typer.Option(help="Size of the folder of --cache-dir.", min=0, rich_help_panel=CAPACITY),
    ] = 4000.0,
    precision: Precision = "auto",
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Serve models over HTTP, with OpenAI's API.

    Listens on this machine only, until Ctrl-C or SIGTERM. A client of OpenAI's API
    needs the base URL http://127.0.0.1:8000/v1; docs/serving.md describes the rest.
    """
    _check_packages()
    from vlmport.serve.log import Log
    from vlmport.serve.models import names_of
    from vlmport.serve.server import Server
    from vlmport.serve.settings import Settings, check_exposure, read_api_keys

    settings = Settings(
        host=host,
        port=port,
        api_keys=() if api_key_file is None else read_api_keys(api_key_file),
        allowed_hosts=tuple(allowed_host or ()),
        cors_origins=tuple(cors_origin or ()),
        allow_images_from=tuple(allow_images_from or ()),
        max_body_bytes=int(max_body_mb * MEGABYTE),
        max_images=max_images,
        max_image_bytes=int(max_image_mb * MEGABYTE),
        max_characters=max_characters,
        max_answers=max_answers,
        body_seconds=body_seconds,
        time_limit=time_limit,
        grace=grace,
        max_models=max_models,
        preload=preload,
        max_running=max_running,
        max_queue=max_queue,
        cache_bytes=int(cache_mb * MEGABYTE),
        cache_dir=cache_dir,
        cache_dir_bytes=int(cache_dir_mb * MEGABYTE),
        precision=precision,
        device=device,
        threads=threads,
    )
    check_exposure(settings, no_auth=no_auth)
    warnings.filterwarnings("ignore", module="PIL")  # an unreadable image is an error of ours
    server = Server(names_of(models or [ANSWERER]), settings, log=Log(as_json=log_json))
    show(server.url)
    who = "this machine only" if settings.is_local else "other machines too"
    needs = "with a key" if settings.api_keys else "without a key"
    say(f"serves {who}, {needs}; Ctrl-C ends it")
    server.serve_until_asked()
    signals.heard()


def _check_packages() -> None:
    """Raise DependencyError unless the packages of the extra `serve` are installed."""
    try:
        import fastapi  # noqa: F401
        import httpx  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import sse_starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise DependencyError(
            f"vlmport serve needs the package {error.name}",
            hint="pip install 'vlmport[serve]'",
            code="dependency.missing",
        ) from error
