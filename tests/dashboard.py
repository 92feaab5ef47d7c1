"""docker/grafana's dashboard, and what its queries ask Prometheus for."""

import json

import promql_parser
from dockerfiles import ROOT

PATH = ROOT / "docker" / "grafana" / "dashboards" / "entmaxkv.json"
DASHBOARD = json.loads(PATH.read_text())
VARIABLES = {"$__rate_interval": "1m", "$model": ".*"}


def panels():
    """Those that draw something."""
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def queries():
    """[(panel title, query)], with Grafana's variables filled in."""
    found = []
    for panel in panels():
        for target in panel["targets"]:
            query = target["expr"]
            for variable, value in VARIABLES.items():
                query = query.replace(variable, value)
            found.append((panel["title"], query))
    return found


def selectors(query):
    """The vector selectors of a query."""
    node = promql_parser.parse(query) if isinstance(query, str) else query
    if isinstance(node, promql_parser.VectorSelector):
        return [node]
    below = []
    for name in ("vector_selector", "expr", "lhs", "rhs"):
        below += [getattr(node, name)] if hasattr(node, name) else []
    below += getattr(node, "args", [])
    return [selector for part in below for selector in selectors(part)]


def metrics():
    """Names of all samples that the dashboard asks for."""
    return {selector.name for _, query in queries() for selector in selectors(query)}
