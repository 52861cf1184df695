"""The models of a server: opened at first use, the least recently used closed.

A model is not closed while one of its requests runs. `lease` keeps it open until its request has
been submitted; from then on the job keeps it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import itertools
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmport import __version__
from vlmport.builtin import builtin_folder, builtin_models
from vlmport.bundle import MANIFEST
from vlmport.errors import OptionError, ServerError, SourceError, did_you_mean, quoted, some_names
from vlmport.loading import load as load_source
from vlmport.runtime.model import VLM
from vlmport.runtime.scheduling import Event, Finished, Job, Scheduler
from vlmport.runtime.scheduling.job import draining
from vlmport.serve.api_errors import RequestError
from vlmport.serve.settings import Settings

Load = Callable[[str], VLM]
Watch = Callable[[str, Job], None]
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


class OpenModel:
    """A model that is open, and its scheduler.

    Attributes:
        name: its name in the API.
        fingerprint: changes with everything that may change an answer.
        created: when it was opened, in seconds since 1970.
    """

    def __init__(self, name: str, vlm: VLM, settings: Settings, watch: Watch | None = None):
        self.name, self.vlm, self._settings, self._watch = name, vlm, settings, watch
        self.scheduler = Scheduler(
            vlm,
            max_running=settings.max_running,
            max_queue=settings.max_queue,
            cache_bytes=settings.cache_bytes,
            cache_dir=settings.cache_dir,
            cache_dir_bytes=settings.cache_dir_bytes,
        )
        self.created = int(time.time())
        manifest = (vlm.components.bundle.folder / MANIFEST).read_bytes()
        of = f"{__version__} {vlm.precision} {vlm.device} {hashlib.sha256(manifest).hexdigest()}"
        self.fingerprint = f"vlmport-{hashlib.sha256(of.encode()).hexdigest()[:12]}"
        self._users, self._lock = 0, threading.Lock()

    @property
    def defaults(self) -> Mapping[str, Any]:
        """The bundle's own options of generation."""
        return self.vlm.components.manifest.generation.defaults

    @property
    def image_options(self) -> Mapping[str, Any]:
        """The bundle's options of the image processor, with their defaults."""
        return self.vlm.components.manifest.image_options

    @property
    def caption_messages(self) -> Sequence[Mapping[str, Any]]:
        """The messages that ask for a caption of one image."""
        return self.vlm.components.manifest.prompt.caption

    @property
    def in_use(self) -> bool:
        """Whether a request needs the model."""
        return self._users > 0

    def hold(self) -> None:
        """Keep the model open until `let_go`."""
        with self._lock:
            self._users += 1

    def let_go(self) -> None:
        """Take back one `hold`."""
        with self._lock:
            self._users -= 1

    async def submit(
        self,
        messages: Sequence[Mapping[str, Any]],
        images: Sequence[bytes],
        *,
        image_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Job:
        """Put a request into the queue. Raises as `Scheduler.submit` does."""
        submit = functools.partial(
            self.scheduler.submit,
            messages,
            images,
            image_options=image_options,
            time_limit=self._settings.time_limit,
            **options,
        )
        submitting = asyncio.create_task(asyncio.to_thread(submit))
        try:
            job = await asyncio.shield(submitting)
        except asyncio.CancelledError:  # the thread goes on
            submitting.add_done_callback(_cancel_job)
            raise
        self.hold()
        job.on_event(self._ended)
        if self._watch is not None:
            self._watch(self.name, job)
        return job

    def _ended(self, event: Event) -> None:
        if isinstance(event, Finished):
            self.let_go()

    def close(self, grace: float = 0) -> None:
        """End the requests, those that run after `grace` seconds, and release the memory."""
        self.scheduler.close(grace)
        self.vlm.close()


def _cancel_job(submitting: asyncio.Task[Job]) -> None:
    """Cancel a job that nobody waits for."""
    if not submitting.cancelled() and submitting.exception() is None:
        submitting.result().cancel()


class Models:
    """The models that a server was started with.

    Attributes:
        sources: name in the API → what `vlmport.load` opens.
        draining: whether the server takes no more requests.
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        settings: Settings,
        *,
        load: Load | None = None,
        watch: Watch | None = None,
    ):
        self.sources, self._settings, self._watch = dict(sources), settings, watch
        self._load = load or functools.partial(
            load_source,
            precision=settings.precision,
            device=settings.device,
            threads=settings.threads,
            image_cache_bytes=0,  # the scheduler has its own
        )
        self._open: dict[str, OpenModel] = {}  # least recently used first
        self._opening = asyncio.Lock()
        self.created = int(time.time())
        self.draining = False

    @property
    def default(self) -> str:
        """The first model, for requests that can't name one."""
        return next(iter(self.sources))

    @property
    def open_models(self) -> tuple[OpenModel, ...]:
        """The models that are open now."""
        return tuple(self._open.values())

    def check_name(self, name: str) -> None:
        """Raise RequestError for a name that is not served."""
        if name not in self.sources:
            raise RequestError(
                f"model {name[:80]!r} is not served here{did_you_mean(name, self.sources)}",
                hint=f"one of {some_names(self.sources)}",
                code="server.unknown-model",
                param="model",
            )

    @contextlib.asynccontextmanager
    async def lease(self, name: str) -> AsyncIterator[OpenModel]:
        """Open a model if it is not, and keep it open while the block runs.

        Raises RequestError for an unknown name, ServerError while the server shuts down or where
        all models that may be open are busy, and what `vlmport.load` raises.
        """
        self.check_name(name)
        model = await self._held(name)
        try:
            yield model
        finally:
            model.let_go()

    async def _held(self, name: str) -> OpenModel:
        while True:
            self._check_draining()
            if (model := self._open.pop(name, None)) is not None:
                self._open[name] = model
                model.hold()
                return model
            # A client that leaves ends its wait; the model is opened, or others would wait again.
            opening = asyncio.create_task(self._opened(name))
            opening.add_done_callback(_heard)
            await asyncio.shield(opening)

    def _check_draining(self) -> None:
        if self.draining:
            raise draining()

    async def _opened(self, name: str) -> None:
        """Open a model, unless another request has opened it while this one waited."""
        async with self._opening:
            self._check_draining()
            if name not in self._open:
                await self._make_room()
                vlm = await asyncio.to_thread(self._load, self.sources[name])
                self._open[name] = OpenModel(name, vlm, self._settings, self._watch)

    async def _make_room(self) -> None:
        while len(self._open) >= self._settings.max_models:
            idle = next((one for one in self._open.values() if not one.in_use), None)
            if idle is None:
                raise ServerError(
                    f"{len(self._open)} models are open and busy, and no more may be open",
                    hint="try again, or start the server with a larger --max-models",
                    code="server.models-busy",
                    retry_after=1,
                )
            del self._open[idle.name]
            await asyncio.to_thread(idle.close)

    async def preload(self) -> None:
        """Open the first models, as many as may be open."""
        for name in itertools.islice(self.sources, self._settings.max_models):
            async with self.lease(name):
                pass

    async def close(self, grace: float) -> None:
        """Take no more requests, and close all models; jobs are cut after `grace` seconds."""
        self.draining = True
        async with self._opening:
            models = self.open_models
            self._open.clear()
            await asyncio.gather(*(asyncio.to_thread(one.close, grace) for one in models))


def _heard(task: asyncio.Task[None]) -> None:
    """Take the error of a task that may have no reader, so that asyncio logs none."""
    if not task.cancelled():
        task.exception()


def names_of(sources: Sequence[str]) -> dict[str, str]:
    """Name the models for the API: NAME=SRC, or the last part of a path, or the source itself.

    Raises OptionError for an empty name and where two have the same one, SourceError for what can't
    be a model.
    """
    named: dict[str, str] = {}
    for given in sources:
        name, is_named, source = given.partition("=")
        if not is_named or Path(given).exists():
            source = given
            name = Path(given).resolve().name if Path(given).exists() else given
        if not name or not source:
            raise OptionError(
                f"model {quoted(given)}: expected NAME=SRC",
                hint="for example assistant=shapes-smolvlm",
                code="option.wrong-value",
            )
        _check_source(source)
        if name in named:
            raise OptionError(
                f"two models have the name {name!r}",
                hint=f"name one of them: OTHER={source}",
                code="server.same-name",
            )
        named[name] = source
    return named


def _check_source(source: str) -> None:
    """Raise SourceError for a misspelled name: a model is opened at its first use only."""
    is_known = builtin_folder(source) is not None or Path(source).expanduser().exists()
    if not is_known and not HUB_ID.fullmatch(source):
        raise SourceError(
            f"{source}: no such folder, and no Hub id{did_you_mean(source, builtin_models())}",
            hint="check the path; `vlmport models` lists the built-in names",
            code="source.not-found",
        )
