"""`vlmport serve`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmport import signals
from vlmport.builtin import ANSWERER
from vlmport.cli.app import SectionedCommand, app
from vlmport.cli.arguments import Device, Precision, Threads
from vlmport.cli.console import say
from vlmport.cli.output import show
from vlmport.errors import DependencyError, OptionError
from vlmport.serve.settings import MEGABYTE, Settings, check_exposure, read_api_keys

LISTEN, ACCESS, LIMITS, CAPACITY, RAY = "Listen", "Access", "Limits", "Capacity", "Replicas"
DEFAULTS = Settings()


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
    ] = DEFAULTS.host,
    port: Annotated[
        int,
        typer.Option(help="Port; 0 takes a free one.", min=0, max=65535, rich_help_panel=LISTEN),
    ] = DEFAULTS.port,
    grace: Annotated[
        float,
        typer.Option(
            help="Seconds that running requests may go on after SIGTERM.",
            min=0,
            rich_help_panel=LISTEN,
        ),
    ] = DEFAULTS.grace,
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
    ] = DEFAULTS.max_body_bytes / MEGABYTE,
    max_images: Annotated[
        int, typer.Option(help="Images in a request.", min=0, rich_help_panel=LIMITS)
    ] = DEFAULTS.max_images,
    max_image_mb: Annotated[
        float, typer.Option(help="Size of an image file.", min=0.001, rich_help_panel=LIMITS)
    ] = DEFAULTS.max_image_bytes / MEGABYTE,
    max_characters: Annotated[
        int,
        typer.Option(help="Characters of all texts in a request.", min=1, rich_help_panel=LIMITS),
    ] = DEFAULTS.max_characters,
    max_answers: Annotated[
        int, typer.Option(help="Answers to one request (n).", min=1, rich_help_panel=LIMITS)
    ] = DEFAULTS.max_answers,
    body_seconds: Annotated[
        float,
        typer.Option(help="Time to send the body of a request.", min=0.1, rich_help_panel=LIMITS),
    ] = DEFAULTS.body_seconds,
    time_limit: Annotated[
        float,
        typer.Option(
            help="Seconds from a request to the end of its answer.",
            min=0.1,
            rich_help_panel=LIMITS,
        ),
    ] = DEFAULTS.time_limit,
    max_models: Annotated[
        int,
        typer.Option(
            help="Models that are open at a time; the least recently used is closed.",
            min=1,
            rich_help_panel=CAPACITY,
        ),
    ] = DEFAULTS.max_models,
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
    ] = DEFAULTS.max_running,
    max_queue: Annotated[
        int,
        typer.Option(
            help="Requests that wait for a model; further ones get status 429.",
            min=0,
            rich_help_panel=CAPACITY,
        ),
    ] = DEFAULTS.max_queue,
    cache_mb: Annotated[
        float,
        typer.Option(
            help="Size of cached images and prompts of a model.", min=0, rich_help_panel=CAPACITY
        ),
    ] = DEFAULTS.cache_bytes / MEGABYTE,
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
    ] = DEFAULTS.cache_dir_bytes / MEGABYTE,
    ray: Annotated[
        bool,
        typer.Option(
            "--ray",
            help="Serve by replicas of Ray Serve, here or on the cluster of RAY_ADDRESS.",
            rich_help_panel=RAY,
        ),
    ] = False,
    replicas: Annotated[
        int, typer.Option(help="Number of replicas with --ray.", min=1, rich_help_panel=RAY)
    ] = 1,
    ray_options: Annotated[
        str | None,
        typer.Option(
            help="Options of ray.serve.deployment, such as "
            '{"autoscaling_config": {"max_replicas": 4}}.',
            metavar="JSON",
            rich_help_panel=RAY,
        ),
    ] = None,
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
    sources = names_of(models or [ANSWERER])
    if ray or ray_options is not None or replicas != 1:
        _serve_on_ray(sources, settings, _ray_options(ray, replicas, ray_options), log_json)
        return
    server = Server(sources, settings, log=Log(as_json=log_json))
    show(server.url)
    who = "this machine only" if settings.is_local else "other machines too"
    needs = "with a key" if settings.api_keys else "without a key"
    say(f"serves {who}, {needs}; Ctrl-C ends it")
    server.serve_until_asked()
    signals.heard()


def _serve_on_ray(
    sources: Mapping[str, str], settings: Settings, options: Mapping[str, Any], log_json: bool
) -> None:
    from vlmport.serve import ray_replicas

    try:
        with ray_replicas.replicas(sources, settings, options, log_json=log_json) as url:
            show(url)
            say("replicas of Ray Serve; Ctrl-C ends them")
            ray_replicas.wait()
    except KeyboardInterrupt:  # Ctrl-C is the way to end it
        signals.heard()


def _ray_options(ray: bool, replicas: int, given: str | None) -> dict[str, Any]:
    """Merge --replicas and --ray-options. Raises OptionError for what contradicts or is no JSON."""
    if not ray:
        raise OptionError(
            "--replicas and --ray-options are for --ray",
            hint="add --ray, or leave them out",
            code="option.contradiction",
        )
    try:
        options = json.loads(given or "{}")
    except ValueError as error:
        raise OptionError(
            f"--ray-options: not JSON: {error}",
            hint='for example {"autoscaling_config": {"max_replicas": 4}}',
            code="option.not-json",
        ) from error
    if not isinstance(options, dict):
        raise OptionError(
            f"--ray-options: expected a JSON object, found {type(options).__name__}",
            hint='for example {"autoscaling_config": {"max_replicas": 4}}',
            code="option.wrong-value",
        )
    scales = "autoscaling_config" in options or "num_replicas" in options
    if scales and replicas != 1:
        raise OptionError(
            "--replicas and the number of replicas in --ray-options contradict each other",
            hint="leave one of them out",
            code="option.contradiction",
        )
    return options if scales else {"num_replicas": replicas, **options}


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
