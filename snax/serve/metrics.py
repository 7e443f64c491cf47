"""Prometheus metrics of a `Service`."""

from collections.abc import Callable
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

Result = Literal["finished", "rejected", "timeout", "malformed", "too_long", "disconnected"]


class Metrics:
    """Metrics in a registry of their own, so that several services can run in a process.

    Args:
        active_streams: returns the number of slots in use.
        waiting_streams: returns the number of streams that wait for a slot.
    """

    def __init__(self, active_streams: Callable[[], int], waiting_streams: Callable[[], int]):
        self._registry = registry = CollectorRegistry()
        self._audio_seconds = self._step_seconds = 0.0

        def gauge(name: str, text: str, value: Callable[[], float]) -> None:
            Gauge(name, text, registry=registry).set_function(value)

        gauge("snax_active_streams", "Slots in use.", active_streams)
        gauge("snax_waiting_streams", "Streams that wait for a slot.", waiting_streams)
        gauge(
            "snax_real_time_factor",
            "Seconds of audio made per second of steps, over all streams since the start.",
            lambda: self._audio_seconds / self._step_seconds if self._step_seconds else 0.0,
        )
        self._steps = Histogram(
            "snax_step_seconds",
            "Duration of a step, which decodes one block of each stream.",
            buckets=(0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1),
            registry=registry,
        )
        self._audio = Counter("snax_audio_seconds_total", "Seconds of audio made.", registry=registry)
        self._dropped = Counter(
            "snax_dropped_tokens_total", "Tokens dropped because they were no code of the next slot.", registry=registry
        )
        self._streams = Counter("snax_streams_total", "Streams by result.", ["result"], registry=registry)
        for result in get_args(Result):
            self._streams.labels(result)  # a counter that exists from the start has a rate at its first increase

    def count_step(self, seconds: float, audio_seconds: float) -> None:
        """Count a step and the audio that it made."""
        self._steps.observe(seconds)
        self._audio.inc(audio_seconds)
        self._step_seconds += seconds
        self._audio_seconds += audio_seconds

    def count_stream(self, result: Result, dropped: int) -> None:
        """Count a stream at its end, and the tokens that it dropped."""
        self._streams.labels(result).inc()
        self._dropped.inc(dropped)

    def text(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self._registry)
