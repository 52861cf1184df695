"""`vlmport serve --ray`: the same app, as replicas of Ray Serve.

Ray Serve starts the replicas, on one machine or on a cluster that RAY_ADDRESS names, restarts those
that die, and balances between them. A request with the header `x-session-id` goes to the replica
that its session had before, which has the conversation's prompt in its cache.

Traps:
- Ray reports its use unless it is told not to, and reads the setting when it is imported.
- The app can't be pickled: each replica makes its own from what can.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from vlmport.errors import DependencyError, OptionError, quoted
from vlmport.serve.settings import Settings

__all__ = ["replicas"]

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
NAME = "vlmport"


@contextlib.contextmanager
def replicas(
    sources: Mapping[str, str], settings: Settings, options: Mapping[str, Any], *, log_json: bool
) -> Iterator[str]:
    """Start replicas, and yield their address once they answer; end them after the block.

    Args:
        sources, settings: as for `create_app`.
        options: of `ray.serve.deployment`, such as num_replicas and autoscaling_config.
        log_json: whether replicas log in JSON.

    Raises DependencyError where Ray is not installed, OptionError for options that it does not
    take.
    """
    ray, serve = _load_ray()
    port = settings.port or _free_port(settings.host)

    def make_app() -> Any:
        from vlmport.serve.app import create_app
        from vlmport.serve.log import Log

        return create_app(sources, settings, log=Log(as_json=log_json))

    config: Any = importlib.import_module("ray.serve.config")
    ours = {
        "max_ongoing_requests": settings.max_running + settings.max_queue,
        "graceful_shutdown_timeout_s": settings.grace,
        "request_router_config": config.RequestRouterConfig(request_router_class=ROUTER),
    }

    class Replica:
        """One process with the app."""

    try:
        deployed = serve.deployment(**{**ours, **options})(serve.ingress(make_app)(Replica))
    except (TypeError, ValueError) as error:
        raise OptionError(
            f"--ray-options: {quoted(str(error))}",
            hint="a JSON object of options of ray.serve.deployment",
            code="option.wrong-value",
        ) from error
    ray.init(include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    try:
        serve.start(http_options={"host": settings.host, "port": port})
        serve.run(deployed.bind(), name=NAME)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        yield f"http://{host}:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def wait() -> None:
    """Wait for Ctrl-C or SIGTERM."""
    threading.Event().wait()


def _load_ray() -> tuple[Any, Any]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        return importlib.import_module("ray"), importlib.import_module("ray.serve")
    except ImportError as error:
        raise DependencyError(
            f"vlmport serve --ray needs the package {error.name}",
            hint="pip install 'vlmport[serve,ray]'",
            code="dependency.missing",
        ) from error


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as found:
        found.bind((host, 0))
        return found.getsockname()[1]
