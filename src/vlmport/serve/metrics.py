"""What a server measures, in the format of Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from vlmport.runtime.scheduling import Event, Job, Piece, SchedulerStats

FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
CONTENT_TYPE = CONTENT_TYPE_LATEST
Stats = Callable[[], Iterable[tuple[str, SchedulerStats]]]

GAUGES = {
    "waiting": "Requests that wait in the queue.",
    "prefilling": "Requests whose prompt is running.",
    "running": "Requests that generate tokens.",
    "running_rows": "Rows of the cache that are in use.",
    "cache_bytes": "Size of cached image features and prompts.",
    "running_bytes": "Size of the buffers of running rows.",
}
COUNTERS = {
    "prompt_tokens": "Tokens of all prompts.",
    "cached_tokens": "Tokens of prompts that were in the cache.",
    "prefill_tokens": "Tokens of prompts that the decoder ran.",
    "decode_tokens": "Tokens that were generated.",
    "steps": "Decode steps.",
    "refused": "Requests that were refused because the queue was full.",
    "images": "Images of all prompts.",
    "images_encoded": "Runs of the vision encoder; the other images were in the cache.",
}


class Metrics:
    """The measurements of one server; servers of one process do not share them."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "vlmport_requests",
            "Requests by path and status.",
            ["path", "status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "vlmport_request_seconds",
            "Time of a request, from its head to the end of its answer.",
            ["path"],
            buckets=(*FIRST, 300),
            registry=self._registry,
        )
        self._received = Counter(
            "vlmport_received_bytes", "Bytes of bodies received.", registry=self._registry
        )
        self._sent = Counter("vlmport_sent_bytes", "Bytes of bodies sent.", registry=self._registry)
        self._first = Histogram(
            "vlmport_time_to_first_token_seconds",
            "Time from a request to its first token.",
            ["model"],
            buckets=FIRST,
            registry=self._registry,
        )
        self._between = Histogram(
            "vlmport_time_between_tokens_seconds",
            "Time between two tokens of an answer.",
            ["model"],
            buckets=BETWEEN,
            registry=self._registry,
        )

    def of_models(self, stats: Stats) -> None:
        """Report the state of schedulers too, which `stats` returns by the model's name."""
        self._registry.register(_Schedulers(stats))

    def request(self, path: str, status: int, seconds: float, received: int, sent: int) -> None:
        """Count one request; `path` is that of a route, so that there are few."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)
        self._received.inc(received)
        self._sent.inc(sent)

    def watch(self, model: str, job: Job) -> None:
        """Measure the time to a job's first token, and between its tokens."""
        last: dict[int, float] = {}

        def seen(event: Event) -> None:
            if not isinstance(event, Piece) or not event.token_ids:
                return
            if not last:
                first = job.times.first_token
                self._first.labels(model).observe((first or event.at) - job.times.queued)
            elif event.sequence in last:
                apart = (event.at - last[event.sequence]) / len(event.token_ids)
                for _ in event.token_ids:
                    self._between.labels(model).observe(apart)
            last[event.sequence] = event.at

        job.on_event(seen)

    def text(self) -> bytes:
        """All measurements, as Prometheus reads them."""
        return generate_latest(self._registry)


class _Schedulers(Collector):
    """Reads the schedulers when Prometheus asks."""

    def __init__(self, stats: Stats):
        self._stats = stats

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        found = list(self._stats())
        for name, text in GAUGES.items():
            gauge = GaugeMetricFamily(f"vlmport_{name}", text, labels=["model"])
            for model, stats in found:
                gauge.add_metric([model], getattr(stats, name))
            yield gauge
        for name, text in COUNTERS.items():
            counter = CounterMetricFamily(f"vlmport_{name}", text, labels=["model"])
            for model, stats in found:
                counter.add_metric([model], getattr(stats, name))
            yield counter
        ended = CounterMetricFamily(
            "vlmport_answers", "Answers by why they ended.", labels=["model", "reason"]
        )
        for model, stats in found:
            for reason, count in stats.ended.items():
                ended.add_metric([model, reason], count)
        yield ended
