"""What a replica's batcher counts, as Prometheus reads it: passes, tokens, what waits, what was refused, the cache."""

import math
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from medmm_ray.service.batching import MIN_PASS_TOKENS
from medmm_ray.service.replica import ReplicaScorer


class BatchCollector(Collector):
    """Reads a scorer's figures when it is asked."""

    def __init__(self, scorer: ReplicaScorer) -> None:
        self._scorer = scorer

    def collect(self) -> Iterator[Metric]:
        """The figures, each with what it means."""
        counts, batcher = self._scorer.batcher.counts, self._scorer.batcher
        cache = batcher.cache
        for name, meaning, total in (
            ("medmm_passes", "Forward passes.", counts.num_passes),
            ("medmm_pass_tokens", "Tokens of all passes.", counts.num_tokens),
            ("medmm_pass_budget_tokens", "Tokens that all passes had room for.", counts.num_budget_tokens),
            ("medmm_pass_seconds", "Seconds in passes.", counts.busy_s),
            ("medmm_retried_passes", "Passes that failed and were read again in parts.", counts.num_retried),
            ("medmm_scored_requests", "Requests that were scored.", counts.num_scored),
            ("medmm_refused_requests", "Requests refused by the expected wait.", counts.num_refused),
            ("medmm_expired_requests", "Requests whose deadline passed.", counts.num_expired),
            ("medmm_cancelled_requests", "Requests whose client went away.", counts.num_cancelled),
            ("medmm_prefix_tokens", "Tokens of prefixes that were looked up.", cache.num_tokens),
            ("medmm_prefix_hit_tokens", "Tokens of prefixes that were known.", cache.num_hit_tokens),
            ("medmm_prefix_evictions", "Prefixes that were dropped for others.", cache.num_evictions),
        ):
            yield CounterMetricFamily(name, meaning, value=total)
        # Prometheus knows infinity, and dashboards draw it badly.
        rate = batcher.meter.rate
        wait_s = batcher.expected_wait(MIN_PASS_TOKENS)
        for name, meaning, value in (
            ("medmm_waiting_requests", "Requests that were let in and not answered.", batcher.num_waiting),
            ("medmm_waiting_tokens", "Tokens that no pass has had yet.", batcher.waiting_tokens),
            ("medmm_expected_wait_seconds", "Wait of a small request that came now.", wait_s),
            ("medmm_tokens_per_second", "Measured rate of passes.", 0.0 if math.isinf(rate) else rate),
            ("medmm_prefix_cache_bytes", "Bytes of prefixes that are kept.", cache.num_bytes),
        ):
            yield GaugeMetricFamily(name, meaning, value=value)
