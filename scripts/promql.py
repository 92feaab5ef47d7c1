"""As much of PromQL as the dashboard's queries need, over scrapes that are held in memory.

`rate` is the growth between the first and the last scrape in its range over the time between them;
Prometheus extrapolates to the ends of the range. Counters are taken not to be reset.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import promql_parser
from prometheus_client.parser import text_string_to_metric_families

Labels = frozenset[tuple[str, str]]
Vector = dict[Labels, float]

AGGREGATES: Mapping[str, Callable[[list[float]], float]] = {"sum": sum, "max": max}


@dataclass(frozen=True)
class Scrape:
    """What /metrics told at a time, in seconds: values by sample name and labels."""

    time: float
    samples: Mapping[str, Vector]

    @classmethod
    def of(cls, time: float, text: str) -> "Scrape":
        samples: dict[str, Vector] = defaultdict(dict)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples[sample.name][frozenset(sample.labels.items())] = sample.value
        return cls(time, samples)


def evaluate(query: str, scrapes: Sequence[Scrape]) -> Vector | float:
    """The query's value at the time of the last scrape.

    Raises NotImplementedError for what is not part of this PromQL.
    """
    return _value(promql_parser.parse(query), scrapes)


def _value(node: promql_parser.Expr, scrapes: Sequence[Scrape]) -> Vector | float:
    if isinstance(node, promql_parser.NumberLiteral):
        return node.val
    if isinstance(node, promql_parser.VectorSelector):
        return _selected(node, scrapes[-1])
    if isinstance(node, promql_parser.ParenExpr):
        return _value(node.expr, scrapes)
    if isinstance(node, promql_parser.AggregateExpr):
        return _aggregate(node, _vector(node.expr, scrapes))
    if isinstance(node, promql_parser.BinaryExpr):
        return _combined(str(node.op), _vector(node.lhs, scrapes), _vector(node.rhs, scrapes))
    if isinstance(node, promql_parser.Call):
        if node.func.name == "rate":
            return _rate(node.args[0], scrapes)
        if node.func.name == "histogram_quantile":
            quantile = _value(node.args[0], scrapes)
            assert isinstance(quantile, float)
            return _quantiles(quantile, _vector(node.args[1], scrapes))
    raise NotImplementedError(f"{node} is not part of this PromQL")


def _vector(node: promql_parser.Expr, scrapes: Sequence[Scrape]) -> Vector:
    value = _value(node, scrapes)
    if not isinstance(value, dict):
        raise NotImplementedError(f"{node} is a number where a vector is expected")
    return value


def _selected(node: promql_parser.VectorSelector, scrape: Scrape) -> Vector:
    def matches(labels: Labels) -> bool:
        values = dict(labels)
        for matcher in node.matchers.matchers:
            value, kind = values.get(matcher.name, ""), str(matcher.op)
            if kind == "MatchOp.Equal":
                found = value == matcher.value
            elif kind == "MatchOp.Re":
                found = re.fullmatch(matcher.value, value) is not None
            else:
                raise NotImplementedError(f"{kind} is not part of this PromQL")
            if not found:
                return False
        return True

    samples = scrape.samples.get(str(node.name), {})
    return {labels: value for labels, value in samples.items() if matches(labels)}


def _rate(node: promql_parser.MatrixSelector, scrapes: Sequence[Scrape]) -> Vector:
    last = scrapes[-1]
    first = next(s for s in scrapes if s.time >= last.time - node.range.total_seconds())
    if first is last:
        return {}
    before = _selected(node.vector_selector, first)
    after = _selected(node.vector_selector, last)
    seconds = last.time - first.time
    return {key: (after[key] - before[key]) / seconds for key in after.keys() & before.keys()}


def _aggregate(node: promql_parser.AggregateExpr, vector: Vector) -> Vector:
    kept = set(node.modifier.labels) if node.modifier else set()
    groups: dict[Labels, list[float]] = defaultdict(list)
    for labels, value in vector.items():
        groups[frozenset((name, text) for name, text in labels if name in kept)].append(value)
    if str(node.op) not in AGGREGATES:
        raise NotImplementedError(f"{node.op} is not part of this PromQL")
    combine = AGGREGATES[str(node.op)]
    return {labels: combine(values) for labels, values in groups.items()}


def _combined(operator: str, left: Vector, right: Vector) -> Vector:
    pairs = {labels: (left[labels], right[labels]) for labels in left.keys() & right.keys()}
    if operator == "+":
        return {labels: a + b for labels, (a, b) in pairs.items()}
    if operator == "-":
        return {labels: a - b for labels, (a, b) in pairs.items()}
    if operator == "/":
        return {labels: a / b if b else math.nan for labels, (a, b) in pairs.items()}
    raise NotImplementedError(f"{operator} is not part of this PromQL")


def _quantiles(quantile: float, vector: Vector) -> Vector:
    """By linear interpolation inside a bucket, as Prometheus does; NaN without observations."""
    groups: dict[Labels, list[tuple[float, float]]] = defaultdict(list)
    for labels, value in vector.items():
        bound = float(dict(labels)["le"])
        groups[frozenset(pair for pair in labels if pair[0] != "le")].append((bound, value))
    return {labels: _quantile(quantile, sorted(buckets)) for labels, buckets in groups.items()}


def _quantile(quantile: float, buckets: list[tuple[float, float]]) -> float:
    rank = quantile * buckets[-1][1]
    if rank == 0:
        return math.nan
    lower, below = 0.0, 0.0
    for bound, count in buckets:
        if count >= rank:
            # Of the last bucket only its lower end is known.
            share = 0.0 if math.isinf(bound) else (rank - below) / (count - below)
            return lower + share * (0.0 if math.isinf(bound) else bound - lower)
        lower, below = bound, count
    return math.nan
