"""scripts/promql.py: the dashboard's queries over scrapes held in memory."""

import math

import dashboard
import pytest
from promql import Scrape, evaluate

TEXT = """
# TYPE read counter
read_total{{engine="0",model_name="m"}} {0}
read_total{{engine="1",model_name="m"}} {1}
read_total{{engine="0",model_name="other"}} 7
# TYPE wait_seconds histogram
wait_seconds_bucket{{le="0.5",model_name="m"}} {2}
wait_seconds_bucket{{le="2",model_name="m"}} {3}
wait_seconds_bucket{{le="+Inf",model_name="m"}} {4}
"""


@pytest.fixture
def scrapes():
    """At 0, 10 and 20 seconds."""
    values = [(0, 0, 0, 0, 0), (100, 10, 4, 8, 8), (140, 10, 6, 16, 20)]
    return [Scrape.of(10.0 * i, TEXT.format(*row)) for i, row in enumerate(values)]


def only(vector):
    (value,) = vector.values()
    return value


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ('sum(read_total{model_name="m"})', 150),
        ('max(read_total{model_name=~".*"})', 140),
        ('sum(rate(read_total{model_name="m"}[20s]))', 7.5),
        ('sum(rate(read_total{model_name="m"}[10s]))', 4),
        ('sum(rate(read_total{engine="1"}[20s])) / sum(rate(read_total{engine="0"}[20s]))', 1 / 14),
        (
            'max(read_total) / (sum(read_total{engine="0"}) + sum(read_total{engine="1"}))',
            140 / 157,
        ),
        ('sum(read_total{engine="0"}) - sum(read_total{engine="1"})', 137),
    ],
)
def test_sums_rates_and_shares(query, expected, scrapes):
    assert only(evaluate(query, scrapes)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("quantile", "expected"),
    # Of 12 waits in the last 10 seconds, 2 were below 0.5 and 8 below 2.
    [(0.1, 0.3), (0.5, 0.5 + 1.5 * 4 / 6), (0.99, 2.0)],
)
def test_quantiles_are_interpolated_in_their_bucket(quantile, expected, scrapes):
    query = f"histogram_quantile({quantile}, sum by (le) (rate(wait_seconds_bucket[10s])))"
    assert only(evaluate(query, scrapes)) == pytest.approx(expected)


def test_what_has_no_value_is_nan_or_absent(scrapes):
    share = (
        'sum(rate(read_total{model_name="other"}[10s])) / sum(rate(read_total{engine="1"}[10s]))'
    )
    assert math.isnan(only(evaluate(share, scrapes)))
    assert evaluate("sum(rate(read_total[10s]))", scrapes[:1]) == {}
    assert evaluate("no_such_metric", scrapes) == {}


def test_what_is_not_part_of_it_is_refused(scrapes):
    for query in ("avg(read_total)", "read_total * read_total", 'read_total{a!="b"}', "time()"):
        with pytest.raises(NotImplementedError):
            evaluate(query, scrapes)


@pytest.mark.parametrize(("title", "query"), dashboard.queries())
def test_every_query_of_the_dashboard_can_be_evaluated(title, query, scrapes):
    assert evaluate(query, scrapes) == {}
