"""The charts of a report, as Vega-Lite specifications.

Text and lines are drawn in ``currentColor``, so that a chart follows the page's colours: light, dark
or printed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flower_split.results.report.rows import (
    PARTS,
    RunData,
    evaluations,
    memory,
    participation,
    rounds,
    sent,
    shares,
    steps,
    timeline,
)
from flower_split.runs.files import Json

Spec = Mapping[str, Json]

_COLOURS = ("#4c8ed9", "#e58a2e", "#4aa564", "#d9544d", "#a077c9", "#8f7a66", "#d672a8", "#8c8c8c")
_PART_COLOURS = ("#4c8ed9", "#8c8c8c", "#4aa564", "#e5b23c")
_STATE_COLOURS = ("#4aa564", "#d9544d", "#e58a2e")
_STATES = ("trained", "left out by the trunk", "adapter excluded")
_ZOOM: Json = {
    "name": "zoom",
    "select": {"type": "interval", "encodings": ["x"], "zoom": "wheel![event.shiftKey]"},
    "bind": "scales",
}
ZOOM_HELP = "Drag to move, Shift and the wheel to zoom, double-click to go back."


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """One chart and the sentence below it."""

    name: str  # of its element
    title: str
    caption: str
    spec: Spec


def config() -> Spec:
    """Return what all charts share."""
    lines: dict[str, Json] = {
        "labelColor": "currentColor",
        "titleColor": "currentColor",
        "domainColor": "currentColor",
        "tickColor": "currentColor",
        "gridColor": "currentColor",
        "gridOpacity": 0.12,
        "titleFontWeight": "normal",
    }
    legend = {"labelColor": "currentColor", "titleColor": "currentColor", "orient": "bottom"}
    return {
        "background": "transparent",
        "font": "system-ui, sans-serif",
        "axis": lines,
        "legend": {**legend, "columns": 2, "labelLimit": 220},
        "header": {"labelColor": "currentColor", "titleColor": "currentColor"},
        "range": {"category": list(_COLOURS)},
        "view": {"stroke": "currentColor", "strokeOpacity": 0.15},
    }


def charts_of(runs: Sequence[RunData]) -> list[Chart]:
    """Return all charts for which there is something to show."""
    several = len(runs) > 1
    made = [
        _perplexity(runs) if several else _perplexity_by_client(runs),
        _loss(runs),
        _timeline(runs),
        _shares(runs),
        _bytes(runs),
        _memory(runs),
        _participation(runs),
    ]
    return [chart for chart in made if _values(chart.spec)]


def _values(spec: Spec) -> Sequence[Json]:
    data = spec["data"]
    values = data["values"] if isinstance(data, Mapping) else ()
    return values if isinstance(values, Sequence) else ()


def _chart(rows: Sequence[Spec], height: int, **spec: Json) -> Spec:
    return {"data": {"values": list(rows)}, "width": "container", "height": height, **spec}


def _x(field: str, title: str, form: str = "quantitative") -> Json:
    axis: Json = {"labelAngle": 0} if form == "ordinal" else {}
    if field in ("round", "step") and form == "quantitative":
        axis = {"tickMinStep": 1, "format": "d"}
    return {"field": field, "type": form, "title": title, "axis": axis}


def _colour(field: str, title: str) -> Json:
    return {"field": field, "type": "nominal", "title": title, "sort": None}


def _perplexity(runs: Sequence[RunData]) -> Chart:
    rows = [row for run in runs for row in rounds(run) if "perplexity" in row]
    y: Json = {"field": "perplexity", "type": "quantitative", "scale": {"zero": False}}
    spec = _chart(
        rows,
        260,
        mark={"type": "line", "point": True, "tooltip": True},
        encoding={"x": _x("round", "round"), "y": y, "color": _colour("run", "run")},
    )
    return Chart(
        name="perplexity",
        title="Held-out perplexity",
        caption="Of all clients' held-out tokens together; round 0 is before training.",
        spec=spec,
    )


def _perplexity_by_client(runs: Sequence[RunData]) -> Chart:
    rows = [row for run in runs for row in evaluations(run)]
    for run in runs:
        rows += [
            {"run": run.name, "client": "all clients", "round": row["round"]}
            | {"perplexity": row["perplexity"]}
            for row in rounds(run)
            if "perplexity" in row
        ]
    y: Json = {"field": "perplexity", "type": "quantitative", "scale": {"zero": False}}
    spec = _chart(
        rows,
        280,
        mark={"type": "line", "point": True, "tooltip": True},
        encoding={"x": _x("round", "round"), "y": y, "color": _colour("client", "client")},
    )
    return Chart(
        name="perplexity",
        title="Held-out perplexity",
        caption="Of each client's own held-out data, and of all together; round 0 is before training.",
        spec=spec,
    )


def _loss(runs: Sequence[RunData]) -> Chart:
    several = len(runs) > 1
    y: Json = {"field": "loss", "type": "quantitative", "scale": {"zero": False}}
    title = "loss (nats per token)"
    if several:
        rows = [
            {**row, "loss": row["train_loss"]}
            for r in runs
            for row in rounds(r)
            if "train_loss" in row
        ]
        x, colour = _x("round", "round"), _colour("run", "run")
    else:
        rows = [row for run in runs for row in steps(run)]
        x, colour = _x("step", "local step"), _colour("client", "client")
    encoding: dict[str, Json] = {"x": x, "y": {**_mapping(y), "title": title}, "color": colour}
    mark: Json = {"type": "line", "strokeWidth": 1.5, "tooltip": True}
    return Chart(
        name="loss",
        title="Training loss",
        caption=("Mean of each round. " if several else "Of each local step's batch. ") + ZOOM_HELP,
        spec=_chart(rows, 240, mark=mark, encoding=encoding, params=[_ZOOM]),
    )


def _mapping(value: Json) -> Mapping[str, Json]:
    return value if isinstance(value, Mapping) else {}


def _parts_colour() -> Json:
    scale: Json = {"domain": list(PARTS.values()), "range": list(_PART_COLOURS)}
    return {"field": "part", "type": "nominal", "title": None, "scale": scale}


def _timeline(runs: Sequence[RunData]) -> Chart:
    rows = [row for run in runs for row in timeline(run)]
    shown = sorted({int(str(row["round"])) for row in rows})
    round_param: Json = {
        "name": "shown",
        "value": shown[-1] if shown else 0,
        "bind": {"input": "select", "options": list(shown), "name": "Round "},
    }
    lanes = len({(str(row["run"]), str(row["client"])) for row in rows})
    y: Json = {"field": "client", "type": "nominal", "title": None}
    if len(runs) > 1:
        rows = [{**row, "client": f"{row['run']}: {row['client']}"} for row in rows]
    encoding: dict[str, Json] = {
        "x": _x("start", "seconds since the client's round began"),
        "x2": {"field": "end"},
        "y": y,
        "color": _parts_colour(),
        "tooltip": [
            {"field": name} for name in ("client", "round", "step", "part", "start", "end")
        ],
    }
    spec = _chart(
        rows,
        max(90, 26 * lanes),
        mark={"type": "bar", "height": {"band": 0.8}, "clip": True},
        encoding=encoding,
        params=[_ZOOM, round_param],
        transform=[{"filter": "datum.round == shown"}],
    )
    return Chart(
        name="timeline",
        title="Where the time of a round goes",
        caption="Each step's measured times, end to end: how much there was of each is measured, their "
        f"order within a step is not. {ZOOM_HELP}",
        spec=spec,
    )


def _shares(runs: Sequence[RunData]) -> Chart:
    rows = [row for run in runs for row in shares(run)]
    if len(runs) > 1:
        rows = [{**row, "client": f"{row['run']}: {row['client']}"} for row in rows]
    lanes = len({str(row["client"]) for row in rows})
    spec = _chart(
        rows,
        max(90, 26 * lanes),
        mark={"type": "bar", "tooltip": True},
        encoding={
            "x": {
                "field": "seconds",
                "type": "quantitative",
                "aggregate": "sum",
                "title": "seconds",
            },
            "y": {"field": "client", "type": "nominal", "title": None},
            "color": _parts_colour(),
        },
    )
    return Chart(
        name="shares",
        title="Time in training steps",
        caption="Over the whole run, without evaluation and aggregation.",
        spec=spec,
    )


def _bytes(runs: Sequence[RunData]) -> Chart:
    several = len(runs) > 1
    rows = [row for run in runs for row in sent(run)]
    lane = "run" if several else "client"
    lanes = len({str(row[lane]) for row in rows})
    size: Json = {
        "field": "bytes",
        "type": "quantitative",
        "aggregate": "sum",
        "title": "bytes",
        "axis": {"format": "~s"},
    }
    spec = _chart(
        rows,
        max(90, 30 * lanes),
        mark={"type": "bar", "tooltip": True},
        encoding={
            "x": size,
            "y": {"field": lane, "type": "nominal", "title": None},
            "color": {"field": "kind", "type": "nominal", "title": None},
        },
    )
    return Chart(
        name="bytes",
        title="Bytes sent and received",
        caption="Up: from the client. Activations and gradients go to the trunk, adapters to the "
        "ServerApp.",
        spec=spec,
    )


def _memory(runs: Sequence[RunData]) -> Chart:
    rows = [row for run in runs for row in memory(run) if row.get("activation_peak_bytes")]
    y: Json = {
        "field": "activation_peak_bytes",
        "type": "quantitative",
        "title": "bytes",
        "axis": {"format": "~s"},
    }
    spec = _chart(
        rows,
        200,
        mark={"type": "line", "point": True, "tooltip": True},
        encoding={"x": _x("round", "round"), "y": y, "color": _colour("run", "run")},
    )
    return Chart(
        name="memory",
        title="Saved activations on the trunk",
        caption="The most in each round, over all clients.",
        spec=spec,
    )


def _participation(runs: Sequence[RunData]) -> Chart:
    rows = [row for run in runs for row in participation(run)]
    if len(runs) > 1:
        rows = [{**row, "client": f"{row['run']}: {row['client']}"} for row in rows]
    lanes = len({str(row["client"]) for row in rows})
    scale: Json = {"domain": list(_STATES), "range": list(_STATE_COLOURS)}
    spec = _chart(
        rows,
        max(60, 24 * lanes),
        mark={"type": "rect", "tooltip": {"content": "data"}, "cornerRadius": 2},
        encoding={
            "x": _x("round", "round", "ordinal"),
            "y": {"field": "client", "type": "nominal", "title": None},
            "color": {"field": "state", "type": "nominal", "title": None, "scale": scale},
        },
    )
    return Chart(
        name="participation",
        title="Who took part",
        caption="Every client in every round in which it trained.",
        spec=spec,
    )
