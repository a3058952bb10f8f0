"""`/metrics`: the engine's figures under vLLM's names and units, so that its dashboards fit.

Counters and gauges are read from the engine when they are asked for. Histograms are filled on the
engine's stepping thread, which is why they are lists of numbers here and not the client library's.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from glmcompile.runtime.request import Completion

if TYPE_CHECKING:
    from glmcompile.runtime.engine import Engine

# vLLM's buckets, which its dashboards' quantiles assume.
_TTFT = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5),
    *(10, 20, 40, 80, 160, 640, 2560),
)
_TOKEN = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10),
    *(20, 40, 80),
)
_REQUEST = (
    *(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960),
    *(1920, 7680),
)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_FINISHED = {"stop": "stop", "length": "length", "cancelled": "abort"}


class _Histogram:
    """Counts of values by bucket; one thread adds, any may read."""

    def __init__(self, name: str, documentation: str, bounds: Sequence[float]) -> None:
        """bounds: the largest value of each bucket; one without an end follows."""
        self.name, self.documentation, self._bounds = name, documentation, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def family(self, labels: dict[str, str]) -> Metric:
        total, buckets = 0, []
        for bound, count in zip((*self._bounds, float("inf")), list(self._counts), strict=True):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else str(float(bound)), total))
        family = HistogramMetricFamily(self.name, self.documentation, labels=list(labels))
        family.add_metric(list(labels.values()), buckets, self._sum)
        return family


class Metrics(Collector):
    """An Observer of the engine, and a collector of its figures."""

    def __init__(self, model_name: str, engine: str = "0") -> None:
        """engine: tells the engines of one server apart."""
        self._labels = {"model_name": model_name, "engine": engine}
        self._engine: Engine | None = None
        self._finished: Counter[str] = Counter()
        new = _Histogram
        self._ttft = new("vllm:time_to_first_token_seconds", "Time to first token.", _TTFT)
        self._inter_token = new(
            "vllm:inter_token_latency_seconds", "From one token to the next.", _TOKEN
        )
        self._per_token = new(
            "vllm:request_time_per_output_token_seconds", "Mean of a request's.", _TOKEN
        )
        self._total = new("vllm:e2e_request_latency_seconds", "From request to answer.", _REQUEST)
        self._queue = new("vllm:request_queue_time_seconds", "Waiting.", _REQUEST)
        self._prefill = new("vllm:request_prefill_time_seconds", "Computing the prompt.", _REQUEST)
        self._decode = new("vllm:request_decode_time_seconds", "From first to last.", _REQUEST)
        self._inference = new("vllm:request_inference_time_seconds", "Computing.", _REQUEST)
        self._prompt = new("vllm:request_prompt_tokens", "Prompt tokens.", _STEP_TOKENS)
        self._generation = new("vllm:request_generation_tokens", "Answer tokens.", _STEP_TOKENS)
        self._step = new("vllm:iteration_tokens_total", "Tokens of a step.", _STEP_TOKENS)
        self._registry = CollectorRegistry(auto_describe=False)

    def serve(self, engine: Engine) -> None:
        """engine: the one that this observes."""
        self._engine = engine
        self._registry.register(self)

    def on_step(self, tokens: int, seconds: float) -> None:
        self._step.add(tokens)

    def on_finished(self, completion: Completion) -> None:
        times, usage = completion.timings, completion.usage
        self._finished[_FINISHED[completion.finish_reason]] += 1
        if not usage.completion_tokens:  # cancelled before its first token
            return
        self._ttft.add(times.ttft)
        for seconds in times.inter_token:
            self._inter_token.add(seconds)
        if times.inter_token:
            self._per_token.add(times.per_token)
        decode = times.total - times.ttft
        self._total.add(times.total)
        self._queue.add(times.queue)
        self._prefill.add(times.prefill)
        self._decode.add(decode)
        self._inference.add(times.prefill + decode)
        self._prompt.add(usage.prompt_tokens)
        self._generation.add(usage.completion_tokens)

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        assert self._engine is not None
        stats = self._engine.stats()
        for gauge, value, documentation in (
            ("num_requests_running", stats.running, "Requests that are computed."),
            ("num_requests_waiting", stats.waiting, "Requests that wait."),
            ("kv_cache_usage_perc", stats.kv_cache_usage, "Blocks in use, 1 is all."),
        ):
            yield self._one(GaugeMetricFamily, f"vllm:{gauge}", documentation, value)
        for counter, value, documentation in (
            ("prompt_tokens", stats.prompt_tokens, "Prompt tokens."),
            ("prompt_tokens_cached", stats.prefix_cache_hits, "Of them, found in the cache."),
            ("generation_tokens", stats.generation_tokens, "Answer tokens."),
            ("num_preemptions", stats.preemptions, "Requests put back for want of blocks."),
            ("prefix_cache_queries", stats.prefix_cache_queries, "Tokens looked for."),
            ("prefix_cache_hits", stats.prefix_cache_hits, "Tokens found."),
            ("mm_cache_queries", stats.encoder_cache_queries, "Images looked for."),
            ("mm_cache_hits", stats.encoder_cache_hits, "Images found."),
        ):
            yield self._one(CounterMetricFamily, f"vllm:{counter}", documentation, value)
        yield self._one(
            CounterMetricFamily,
            "glmcompile:failed_steps",
            "Steps and encodings that failed, repetitions included.",
            stats.failed_steps,
        )
        finished = CounterMetricFamily(
            "vllm:request_success",
            "Finished requests.",
            labels=[*self._labels, "finished_reason"],
        )
        for reason in _FINISHED.values():
            finished.add_metric([*self._labels.values(), reason], self._finished[reason])
        yield finished
        for histogram in vars(self).values():
            if isinstance(histogram, _Histogram):
                yield histogram.family(self._labels)

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self._registry)

    def _one(
        self,
        kind: type[GaugeMetricFamily | CounterMetricFamily],
        name: str,
        text: str,
        value: float,
    ) -> Metric:
        family = kind(name, text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family
