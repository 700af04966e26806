"""What the service counts, as Prometheus reads it. Only this file imports prometheus_client."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from medvl.serve.backend import Backend
from medvl.serve.http import Seen
from medvl.serve.interface import End

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)


class Metrics:
    """Counters of one service."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        about: Any = {"registry": self.registry}
        self.requests = Counter(
            "medvl_requests", "Requests by route and status", ("route", "status"), **about
        )
        self.seconds = Histogram(
            "medvl_request_seconds", "Seconds of a request", ("route",), buckets=_SECONDS, **about
        )
        self.first_token = Histogram(
            "medvl_time_to_first_token_seconds",
            "Seconds from a request to its first token",
            buckets=_SECONDS,
            **about,
        )
        self.prompt_tokens = Counter("medvl_prompt_tokens", "Tokens of prompts", **about)
        self.answer_tokens = Counter("medvl_generation_tokens", "Tokens of answers", **about)
        self.ends = Counter("medvl_answers", "Answers by how they ended", ("reason",), **about)
        self.values = Counter("medvl_values", "Extracted values by their evidence", ("status",), **about)
        self.warnings = Counter(
            "medvl_value_warnings", "Contradictions in extracted values", ("kind",), **about
        )
        self.calls = Gauge(
            "medvl_calls", "Calls that a process answers or that wait for it", ("process",), **about
        )
        self.load = Gauge("medvl_load", "What a process says of its load", ("process", "what"), **about)
        self.up = Gauge("medvl_process_ready", "Whether a process is ready", ("process",), **about)
        self.restarts = Gauge(
            "medvl_process_restarts", "How often a process was started again", ("process",), **about
        )

    def add_request(self, request: Seen) -> None:
        self.requests.labels(request.route, str(request.status)).inc()
        self.seconds.labels(request.route).observe(request.elapsed)

    def add_answer(self, end: End) -> None:
        self.prompt_tokens.inc(end.prompt_tokens)
        self.answer_tokens.inc(end.answer_tokens)
        self.ends.labels(end.reason).inc()
        self.first_token.observe(end.queued_s + end.first_token_s)

    def text(self, backend: Backend) -> bytes:
        """All of it in the text format of Prometheus."""
        for worker in backend.workers:
            self.calls.labels(worker.name).set(worker.pending)
            self.up.labels(worker.name).set(worker.state == "ready")
            self.restarts.labels(worker.name).set(worker.restarts)
            for what, number in worker.load.items():
                self.load.labels(worker.name, what).set(number)
        return generate_latest(self.registry)
