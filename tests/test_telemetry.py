"""Counter files: one a worker, summed by readers, removed when their worker is gone."""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from entmaxkv_kernels import Counter
from entmaxkv_vllm import telemetry

LAYERS = 3
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(telemetry, "_SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(telemetry, "_mapped", {})
    return tmp_path


def config(instance):
    model = SimpleNamespace(get_total_num_hidden_layers=lambda: LAYERS)
    return SimpleNamespace(instance_id=instance, model_config=model)


def test_what_a_worker_adds_is_read_at_once_and_only_under_its_own_engine():
    counters = telemetry.worker_counters(config("one"))
    counters.row(2, CPU)[Counter.PAGES_READ] += 7
    counters.publish(2)
    assert telemetry.worker_counters(config("one")) is counters
    assert telemetry.read_counters("one")[2, Counter.PAGES_READ] == 7
    assert telemetry.read_counters("one").sum() == 7
    assert telemetry.read_counters("another").shape == (0, len(Counter))


def test_a_gpu_counts_in_its_memory_and_the_last_layer_alone_copies_once_a_step(monkeypatch):
    registered = []
    monkeypatch.setattr(telemetry, "_register_with_gpu", registered.append)
    counters = telemetry.worker_counters(config("one"))
    # The meta device stands for a GPU: a device that is no CPU, whose copies can be looked at.
    rows = [counters.row(layer, torch.device("meta")) for layer in (0, 2)]
    assert registered == [counters.shared]
    assert all(row.device.type == "meta" and row.shape == (len(Counter),) for row in rows)
    copied = []
    counters.shared = SimpleNamespace(copy_=lambda table, non_blocking: copied.append(table.shape))
    counters.publish(0)
    assert copied == []
    counters.publish(2)
    assert copied == [(LAYERS, len(Counter))]


def test_workers_are_summed_and_one_that_is_just_starting_is_passed_over(folder):
    telemetry.worker_counters(config("one")).row(1, CPU)[Counter.STEPS] = 2
    np.full((LAYERS, len(Counter)), 5, dtype=np.int64).tofile(folder / "entmaxkv-one-999999")
    (folder / "entmaxkv-one-999998").touch()
    assert telemetry.read_counters("one")[1, Counter.STEPS] == 7


def test_files_of_dead_workers_are_removed_and_those_of_living_ones_kept(folder):
    dead = folder / "entmaxkv-gone-1"
    dead.write_bytes(b"")
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'wb'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('locked', flush=True); sys.stdin.read()"
    )
    living = folder / "entmaxkv-other-2"
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(living)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        child.stdout.readline()
        telemetry.worker_counters(config("mine"))
        telemetry._remove_orphans()
        assert not dead.exists()
        assert living.exists()
        assert (folder / f"entmaxkv-mine-{os.getpid()}").exists()
    finally:
        child.communicate()


def test_a_file_that_cannot_be_opened_is_left_alone(folder, monkeypatch):
    path = folder / "entmaxkv-foreign-3"
    path.touch()

    def refuse(*arguments):
        raise PermissionError("owned by somebody else")

    monkeypatch.setattr(telemetry.fcntl, "flock", refuse)
    telemetry._remove_orphans()
    assert path.exists()


@pytest.fixture
def registry(monkeypatch):
    from prometheus_client import CollectorRegistry

    from entmaxkv_vllm import metrics

    own = CollectorRegistry()
    monkeypatch.setattr(metrics, "REGISTRY", own)
    monkeypatch.setattr(metrics.EntmaxKVStatLogger, "_registered", {})
    return own


def served(instance, path):
    """As much of an engine's configuration as the stat logger looks at."""
    backend = SimpleNamespace(get_path=lambda: path)
    engine = config(instance)
    engine.model_config.served_model_name = ["needle"]
    engine.attention_config = SimpleNamespace(backend=backend, backend_per_kind={})
    return engine


LABELS = {"model_name": "needle"}


@pytest.fixture(params=[False, True], ids=["by-model", "by-layer"])
def by_layer(request, monkeypatch):
    """Whether the engine's configuration asks for series of each layer."""
    from entmaxkv_vllm import metrics

    options = SimpleNamespace(layer_metrics=request.param)
    monkeypatch.setattr(metrics, "from_vllm", lambda engine: options)
    return request.param


def test_metrics_count_from_the_first_request_on_and_name_the_model(registry, by_layer):
    from entmaxkv_vllm.metrics import EntmaxKVStatLogger
    from entmaxkv_vllm.plugin import BACKEND_PATH

    engine = served("one", BACKEND_PATH)
    counters = telemetry.worker_counters(engine)
    logger = EntmaxKVStatLogger(engine)
    EntmaxKVStatLogger(engine, 1)
    counters.row(0, CPU)[Counter.PAGES_READ] = 100
    logger.log_engine_initialized()
    counters.row(0, CPU)[Counter.PAGES_READ] += 5
    counters.row(2, CPU)[Counter.PAGES_READ] = 7
    logger.log_engine_initialized()
    assert registry.get_sample_value("entmaxkv_pages_read_total", LABELS) == 12
    assert registry.get_sample_value("entmaxkv_pages_held_total", LABELS) == 0
    found = [
        registry.get_sample_value("entmaxkv_layer_pages_read_total", LABELS | {"layer": str(layer)})
        for layer in range(LAYERS)
    ]
    assert found == ([5, 0, 7] if by_layer else [None] * LAYERS)


def test_metrics_of_workers_that_started_after_the_look_at_warm_up_are_counted(registry, by_layer):
    from entmaxkv_vllm.metrics import EntmaxKVCollector

    collector = EntmaxKVCollector("one", "needle", by_layer)
    collector.forget_warm_up()
    telemetry.worker_counters(config("one")).row(1, CPU)[Counter.STEPS] = 3
    registry.register(collector)
    assert registry.get_sample_value("entmaxkv_steps_total", LABELS) == 3


def test_a_server_with_another_backend_gets_no_metrics_of_ours(registry):
    from entmaxkv_vllm.metrics import EntmaxKVStatLogger

    logger = EntmaxKVStatLogger(served("one", "vllm.another.Backend"))
    logger.log_engine_initialized()
    logger.record()
    assert list(registry.collect()) == []
