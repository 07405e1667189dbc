"""What the server counts, for Prometheus. Labels are names of served models only, never what a client sent."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

OUTCOMES = ("answered", "refused", "busy", "failed", "left")
"""What becomes of a request: status 200; 4xx; 503; 500; its client left, or did not take all of the answer in time."""
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256)


class Metrics:
    """The counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        """Start at zero."""
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter("keyed_xai_requests", "Requests for results.", ["model", "outcome"], registry=registry)
        self._seconds = Histogram(
            "keyed_xai_request_seconds", "From a request's head to the end of its answer.", ["model"], buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self._batches = Histogram(
            "keyed_xai_batch_images", "Images that ran as one batch.", ["model"], buckets=_BATCHES, registry=registry
        )
        self._runs = Histogram(
            "keyed_xai_batch_seconds", "Time a batch ran.", ["model"], buckets=_SECONDS, registry=registry
        )
        self._images = Counter("keyed_xai_images", "Images that ran.", ["model"], registry=registry)
        self._waiting = Gauge("keyed_xai_queue_images", "Images that wait.", ["model"], registry=registry)
        self._inside = Gauge("keyed_xai_in_flight_requests", "Requests being worked on.", ["model"], registry=registry)

    def add_model(self, name: str, *, waiting: Callable[[], float], inside: Callable[[], float]) -> None:
        """Show a model with all its counters at zero.

        Args:
            name: Name of the model.
            waiting: Returns the images in its queue.
            inside: Returns the requests being worked on.
        """
        for outcome in OUTCOMES:
            self._requests.labels(name, outcome)
        for family in (self._seconds, self._batches, self._runs, self._images):
            family.labels(name)
        self._waiting.labels(name).set_function(waiting)
        self._inside.labels(name).set_function(inside)

    def count_request(self, name: str, outcome: str, seconds: float) -> None:
        """Count a request, of one of `OUTCOMES`, that took this long."""
        self._requests.labels(name, outcome).inc()
        self._seconds.labels(name).observe(seconds)

    def count_batch(self, name: str, images: int, seconds: float) -> None:
        """Count a batch that ran for this long."""
        self._batches.labels(name).observe(images)
        self._runs.labels(name).observe(seconds)
        self._images.labels(name).inc(images)

    def to_text(self) -> bytes:
        """Return all of it in Prometheus' text format."""
        return generate_latest(self.registry)
