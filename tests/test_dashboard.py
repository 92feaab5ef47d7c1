"""The Grafana dashboard: Grafana's types know its fields, Prometheus can parse its queries."""

import json
from itertools import combinations

import dashboard
import pytest
import yaml
from dashboard import DASHBOARD, metrics, panels, queries, selectors
from dockerfiles import ROOT
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from entmaxkv_vllm.metrics import DESCRIPTIONS

GRAFANA = ROOT / "docker" / "grafana"
COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]


def as_grafana_reads_it(data):
    """Through the types that Grafana publishes; what they do not know is lost."""
    plugins.register_default_plugins()
    return json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(data)))


def lost(written, read, path=""):
    """Places in `written` that `read` does not have, or has with another value."""
    if isinstance(written, dict) and isinstance(read, dict):
        parts = [(key, value, read.get(key)) for key, value in written.items()]
    elif isinstance(written, list) and isinstance(read, list) and len(written) == len(read):
        parts = [(i, *pair) for i, pair in enumerate(zip(written, read, strict=True))]
    else:
        return [] if written == read else [path]
    return [place for name, *pair in parts for place in lost(*pair, f"{path}/{name}")]


def test_grafanas_types_know_every_field():
    assert lost(DASHBOARD, as_grafana_reads_it(DASHBOARD)) == []


def test_a_field_that_grafana_does_not_know_would_be_seen():
    misspelled = json.loads(json.dumps(DASHBOARD))
    misspelled["panels"][1]["fieldConfig"]["defaults"]["unitt"] = "s"
    misspelled["schemaversion"] = 39
    assert set(lost(misspelled, as_grafana_reads_it(misspelled))) == {
        "/schemaversion",
        "/panels/1/fieldConfig/defaults/unitt",
    }


def test_what_grafana_needs_to_load_it_is_there():
    assert {"uid", "title", "schemaVersion", "panels", "templating", "time"} <= DASHBOARD.keys()
    assert "__inputs" not in DASHBOARD, "an export for sharing, which provisioning does not fill in"
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in panels():
        assert panel["title"] and panel["targets"]
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)


def test_panels_do_not_overlap_and_fit_the_width():
    def area(panel):
        place = panel["gridPos"]
        rows = range(place["y"], place["y"] + place["h"])
        return {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in rows}

    for panel in DASHBOARD["panels"]:
        assert max(x for x, _ in area(panel)) < 24
    for one, other in combinations(DASHBOARD["panels"], 2):
        assert not area(one) & area(other), (one["title"], other["title"])


def test_the_data_source_is_a_variable_everywhere():
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    for place in (*panels(), variables["model"]):
        assert place["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        for target in place.get("targets", ()):
            assert target["datasource"] == place["datasource"]


@pytest.mark.parametrize(("title", "query"), queries())
def test_prometheus_can_parse_a_query_and_it_asks_for_the_chosen_model(title, query):
    found = selectors(query)
    assert found
    for selector in found:
        (matcher,) = selector.matchers.matchers
        assert (matcher.name, matcher.value) == ("model_name", ".*")


def test_the_counters_of_decoding_are_drawn_by_their_names():
    drawn = {name for name in metrics() if name.startswith("entmaxkv_")}
    told = {f"entmaxkv_{counter.name.lower()}_total" for counter in DESCRIPTIONS}
    main = ("STEPS", "SPARSE_STEPS", "PAGES_HELD", "PAGES_READ", "SUPPORT", "QUERY_HEADS")
    assert {f"entmaxkv_{name.lower()}_total" for name in main} <= drawn <= told
    (model,) = [v for v in DASHBOARD["templating"]["list"] if v["name"] == "model"]
    assert model["query"]["query"] == "label_values(entmaxkv_steps_total, model_name)"


def test_grafana_is_provisioned_with_the_dashboard_and_composes_prometheus():
    grafana = COMPOSE["grafana"]
    mounts = dict(volume.split(":")[:2] for volume in grafana["volumes"])
    provisioning = yaml.safe_load(
        (GRAFANA / "provisioning/datasources/prometheus.yaml").read_text()
    )
    (source,) = provisioning["datasources"]
    assert source["type"] == "prometheus" and "prometheus" in COMPOSE
    published = COMPOSE["prometheus"]["ports"][0].split(":")[-1]
    assert source["url"] == f"http://prometheus:{published}"
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/entmaxkv.yaml").read_text())[
        "providers"
    ]
    assert provider["type"] == "file"
    assert mounts["./grafana/dashboards"] == provider["options"]["path"]
    assert mounts["./grafana/provisioning"] == "/etc/grafana/provisioning"
    assert dashboard.PATH.parent == GRAFANA / "dashboards"
