"""The counters on the server's /metrics page."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector
from vllm.v1.metrics.loggers import StatLoggerBase

from entmaxkv_kernels import Counter
from entmaxkv_vllm.config import from_vllm
from entmaxkv_vllm.plugin import chosen_backends, is_entmaxkv
from entmaxkv_vllm.telemetry import read_counters

if TYPE_CHECKING:
    from vllm.config import VllmConfig

DESCRIPTIONS = {
    Counter.STEPS: "Decode steps: one for each sequence, layer and token",
    Counter.SPARSE_STEPS: "Decode steps in which a sparse selector chose the pages",
    Counter.PAGES_HELD: "Pages that dense decoding would have read, per KV head",
    Counter.PAGES_READ: "Pages whose keys decoding read, per KV head",
    Counter.SUPPORT: "Tokens with a weight above zero, summed over query heads",
    Counter.QUERY_HEADS: "Query heads that the support was summed over",
    Counter.FALLBACKS: "Query heads whose keys were read once more, as a guess of theirs failed",
    Counter.APPENDED_PAGES: "Pages that steps wrote new keys and values to, per KV head",
    Counter.CERTIFIED: "Query heads whose output is proved to be the exact one",
    Counter.BOUND_TO_1E_4: "Query heads whose certificate is above 0 and at most 1e-4",
    Counter.BOUND_TO_1E_3: "Query heads whose certificate is above 1e-4 and at most 1e-3",
    Counter.BOUND_TO_1E_2: "Query heads whose certificate is above 1e-3 and at most 0.01",
    Counter.BOUND_TO_1E_1: "Query heads whose certificate is above 0.01 and at most 0.1",
    Counter.BOUND_BELOW_1: "Query heads whose certificate is above 0.1 and below 1",
    Counter.VACUOUS: "Query heads whose certificate is 1, which says nothing",
}


class EntmaxKVCollector(Collector):
    """Reads the workers' counters when Prometheus asks, never in between.

    by_layer: whether each layer has series of its own, under other names: they do not add to sums.
    """

    def __init__(self, instance_id: str, model_name: str, by_layer: bool = False) -> None:
        self.instance_id = instance_id
        self.model_name = model_name
        self.by_layer = by_layer
        self.before: np.ndarray | None = None

    def table(self) -> np.ndarray:
        """The engine's counters since warm-up, [layers, len(Counter)] int64."""
        table = read_counters(self.instance_id)
        if self.before is None or self.before.shape != table.shape:
            return table
        return table - self.before

    def forget_warm_up(self) -> None:
        """Leave out what vLLM decoded before the first request."""
        if self.before is None:
            self.before = read_counters(self.instance_id)

    def collect(self) -> Iterator[CounterMetricFamily]:
        table = self.table()
        for counter in Counter:
            name, text = counter.name.lower(), DESCRIPTIONS[counter]
            family = CounterMetricFamily(f"entmaxkv_{name}", text, labels=["model_name"])
            family.add_metric([self.model_name], int(table[:, counter].sum()))
            yield family
            if self.by_layer:
                labels = ["model_name", "layer"]
                family = CounterMetricFamily(f"entmaxkv_layer_{name}", text, labels=labels)
                for layer, count in enumerate(table[:, counter]):
                    family.add_metric([self.model_name, str(layer)], int(count))
                yield family


class EntmaxKVStatLogger(StatLoggerBase):
    """vLLM creates it in the API server; all it does is to register the collector."""

    _registered: dict[str, EntmaxKVCollector] = {}  # noqa: RUF012  one per engine, per process

    def __init__(self, vllm_config: "VllmConfig", engine_index: int = 0) -> None:
        instance = self.instance_id = vllm_config.instance_id
        if not any(map(is_entmaxkv, chosen_backends(vllm_config))):
            return
        if instance not in self._registered:
            names = vllm_config.model_config.served_model_name
            name = names if isinstance(names, str) else names[0]
            by_layer = from_vllm(vllm_config).layer_metrics
            self._registered[instance] = EntmaxKVCollector(instance, name, by_layer)
            REGISTRY.register(self._registered[instance])

    def record(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the counters are read at scrape time."""

    def log_engine_initialized(self) -> None:
        """Count from here on."""
        if self.instance_id in self._registered:
            self._registered[self.instance_id].forget_warm_up()
