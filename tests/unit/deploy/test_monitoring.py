"""Alert rules and dashboard: every metric that they name is one that the trunk serves."""

import json
import re

import pytest
import yaml

from flower_split.protocol.values import SlotReport, TrunkStatus
from tests.support.documentation import ROOT

pytest.importorskip("prometheus_client", reason="the extra metrics")
from flower_split.trunk.service.metrics import PREFIX, Sources, TrunkCollector  # noqa: E402

DEPLOY = ROOT / "deploy"
OF_OTHERS = {"up", "process_resident_memory_bytes"}  # Prometheus's own, and the process collector's
FUNCTIONS = {"rate", "increase", "sum", "time"}


def served() -> dict[str, set[str]]:
    """Sample name -> its labels, of everything that a trunk of several experiments can serve."""
    status = TrunkStatus(epoch=1, version=0, slots=(SlotReport(slot=0),))
    sources = Sources(
        status=lambda: status,
        refusals=lambda: {("Forward", "NO_ROUND"): 1},
        checkpoints=DEPLOY,
        experiments=lambda: {"one": status},
    )
    found: dict[str, set[str]] = {}
    for metric in TrunkCollector(sources).collect():
        for sample in metric.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    # The one metric that needs a certificate's file is in tests/unit/trunk/test_metrics.py.
    return {**found, f"{PREFIX}certificate_end_timestamp_seconds": set()}


def names_in(expression: str) -> set[str]:
    """Metrics of a PromQL expression: words that are no function, label, duration or number."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", expression)
    return set(re.findall(r"\b[a-zA-Z_:][\w:]*\b", re.sub(r"\b\d[\w.]*", "", bare))) - FUNCTIONS


def rules() -> list[dict[str, object]]:
    groups = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def panels() -> list[dict[str, object]]:
    return list(json.loads((DEPLOY / "grafana" / "trunk.json").read_text())["panels"])


def test_every_metric_of_the_alert_rules_is_served() -> None:
    known = served()
    for rule in rules():
        names = names_in(str(rule["expr"]))
        assert names and names <= known.keys() | OF_OTHERS, rule["alert"]


def test_labels_that_annotations_show_are_of_their_metric() -> None:
    known = served()
    for rule in rules():
        shown = set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"])))
        of_metric = set().union(*(known.get(name, set()) for name in names_in(str(rule["expr"]))))
        assert shown <= of_metric | {"instance", "job"}, rule["alert"]


def test_alert_rules_have_summary_remedy_and_severity_and_cover_what_wakes_an_operator() -> None:
    for rule in rules():
        assert rule["annotations"].keys() == {"summary", "remedy"}
        assert rule["labels"]["severity"] in ("page", "warning", "info")
    expressions = " ".join(str(rule["expr"]) for rule in rules())
    for name in ("slot_waited_seconds > 30", "rounds_aborted", "disk_free", "certificate_end"):
        assert name in expressions


def test_every_metric_of_the_dashboard_is_served_and_panels_do_not_overlap() -> None:
    known, taken = served(), set()
    for panel in panels():
        for target in panel["targets"]:
            names = names_in(target["expr"])
            assert names and names <= known.keys() | OF_OTHERS, panel["title"]
            legend = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert legend <= set().union(*(known.get(name, set()) for name in names))
        place = panel["gridPos"]
        cells = {
            (place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in panels()}) == len(panels())


def test_dashboard_tells_experiments_apart_and_lets_one_be_chosen() -> None:
    known = served()
    dashboard = json.loads((DEPLOY / "grafana" / "trunk.json").read_text())
    chosen = {item["name"]: item for item in dashboard["templating"]["list"]}["experiment"]
    assert chosen["allValue"] == ".*"  # also where a trunk of one experiment has no such label
    (metric,) = re.findall(r"label_values\((\w+), experiment\)", chosen["query"]["query"])
    assert "experiment" in known[metric]
    for panel in panels():
        for target in panel["targets"]:
            of_experiments = [
                n for n in names_in(target["expr"]) if "experiment" in known.get(n, ())
            ]
            filters = target["expr"].count('{experiment=~"$experiment"}')
            assert filters == len(of_experiments), panel["title"]
            assert ("{{experiment}}" in target["legendFormat"]) == bool(of_experiments)


def test_prometheus_reads_the_rules_and_the_trunks_port() -> None:
    settings = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    assert settings["rule_files"] == ["alerts.yml"]
    [job] = settings["scrape_configs"]
    assert all(f'job="{job["job_name"]}"' in str(r["expr"]) for r in rules() if "up{" in r["expr"])


def test_a_name_that_is_not_served_is_found() -> None:
    expression = f"rate({PREFIX}no_such_total[5m]) > 2 * {PREFIX}queue_seconds{{slot='x'}} + 1e9"
    assert names_in(expression) - served().keys() == {f"{PREFIX}no_such_total"}
