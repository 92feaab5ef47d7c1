"""Record what the Grafana dashboard would show of a server under load, for `entmaxkv plot`.

Serves the model that ships with the package and asks it in three phases: short texts, which decode
exactly; long ones, one at a time; long ones together. Scrapes /metrics meanwhile, evaluates the
dashboard's own queries over the scrapes (promql.py, not Prometheus) and writes their values.
"""

import argparse
import asyncio
import json
import math
import random
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from promql import Scrape, evaluate

from entmaxkv_vllm import DEMO_MODEL
from entmaxkv_vllm.bench.provenance import about
from entmaxkv_vllm.bench.server import send_all, served_model
from entmaxkv_vllm.retrieval import needle_prompt
from entmaxkv_vllm.server import Server

DASHBOARD = Path(__file__).resolve().parent.parent / "docker/grafana/dashboards/entmaxkv.json"
SCRAPE_SECONDS = 2
RANGE_SECONDS = 16
OPTIONS = {"selector": "topk", "token_budget": 1024, "exact_below": 1024, "certificate": True}
PHASES = {
    "short texts": (24, 4, 500, 900),
    "long texts, one at a time": (8, 1, 2500, 4000),
    "long texts together": (24, 8, 1500, 5000),
}
"""Requests, how many at once, tokens of the shortest and longest text."""
OUTPUT_TOKENS = 48


class Scraper(threading.Thread):
    """Reads /metrics every SCRAPE_SECONDS until it is stopped."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url = url
        self.scrapes: list[Scrape] = []
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(SCRAPE_SECONDS):
            with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as reply:
                self.scrapes.append(Scrape.of(time.monotonic(), reply.read().decode()))

    def stop(self) -> list[Scrape]:
        self._done.set()
        self.join()
        return self.scrapes


def bodies(model: str, count: int, shortest: int, longest: int, rng: random.Random) -> list[Any]:
    return [
        {
            "model": model,
            "prompt": needle_prompt(rng, tokens=rng.randint(shortest, longest)).prompt,
            "max_tokens": OUTPUT_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        for _ in range(count)
    ]


def series(target: dict[str, Any], scrapes: list[Scrape]) -> list[float | None]:
    """A query's value at each scrape; None where it has none."""
    query = target["expr"].replace("$__rate_interval", f"{RANGE_SECONDS}s").replace("$model", ".*")
    values: list[float | None] = []
    for end in range(1, len(scrapes) + 1):
        found = evaluate(query, scrapes[:end])
        assert isinstance(found, dict) and len(found) <= 1, f"{query} is not one series"
        value = next(iter(found.values()), math.nan)
        values.append(float(f"{value:.4g}") if math.isfinite(value) else None)
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--commit", help="of a copy of the code that is no checkout")
    args = parser.parse_args()
    rng, phases = random.Random(0), []
    serving = ("--max-model-len=8192", "--enforce-eager", "--dtype=float32")
    with Server(
        str(DEMO_MODEL), additional_config={"entmaxkv": OPTIONS}, arguments=serving
    ) as server:
        model, scraper = served_model(server.url), Scraper(server.url)
        start = time.monotonic()
        scraper.start()
        for name, (count, running, shortest, longest) in PHASES.items():
            phases.append({"name": name, "start": round(time.monotonic() - start, 1)})
            asked = bodies(model, count, shortest, longest, rng)
            for answer in asyncio.run(send_all(server.url, asked, running)):
                if isinstance(answer, BaseException):
                    raise answer
        scrapes = scraper.stop()
    panels = [
        {
            "title": panel["title"],
            "unit": panel["fieldConfig"]["defaults"]["unit"],
            "series": {
                target["legendFormat"]: series(target, scrapes) for target in panel["targets"]
            },
        }
        for panel in json.loads(DASHBOARD.read_text())["panels"]
        if panel["type"] == "timeseries"
    ]
    result = about(args.commit) | {
        "model": DEMO_MODEL.name,
        "selector": OPTIONS["selector"],
        "rate_seconds": RANGE_SECONDS,
        "phases": phases,
        "seconds": [round(scrape.time - start, 1) for scrape in scrapes],
        "panels": panels,
    }
    args.out.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
