"""The report's page: HTML with its styles, scripts and data inside, so that it needs no network."""

import functools
import html
import importlib.util
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from flower_split.errors import ConfigError
from flower_split.results.report.charts import Chart, charts_of, config
from flower_split.results.report.rows import RunData, differences, read_runs
from flower_split.runs.files import Json
from flower_split.runtime.atomic_files import write_atomically

FILE = "report.html"
MAX_BYTES = 5_000_000
_LIBRARY = "vl_convert"
_HERE = "flower_split.results.report"


def can_be_written() -> bool:
    """Return whether the extra ``report`` is installed."""
    return importlib.util.find_spec(_LIBRARY) is not None


def check_can_be_written() -> None:
    """Check that the extra ``report`` is installed.

    Raises:
        ConfigError: It is not.
    """
    if not can_be_written():
        raise ConfigError(
            "a report needs vl-convert-python, which is not installed. Install it: "
            "pip install 'flower-split[report]'."
        )


def write_report(runs: Sequence[Path], out: Path, figures: Path | None = None) -> Path:
    """Write one page about one run, or about several beside each other.

    Args:
        runs: Run directories; the first is what the others are compared with.
        out: The page.
        figures: Directory for every chart as PNG and PDF; None: none are written.

    Raises:
        ConfigError: The extra ``report`` is not installed.
        RunDirectoryError: One is no run directory, or a file is damaged.
    """
    check_can_be_written()
    write_page(read_runs(runs), out)
    if figures is not None:
        write_figures(runs, figures)
    return out


def write_page(runs: Sequence[RunData], out: Path) -> None:
    """Write the page about runs that have been read.

    Raises:
        ConfigError: The extra ``report`` is not installed.
    """
    write_atomically(out, page_of(runs, drawing()).encode())


@functools.cache
def drawing() -> str:
    """Return the JavaScript of every page; making it takes seconds, once in a process.

    Raises:
        ConfigError: The extra ``report`` is not installed.
    """
    check_can_be_written()
    import vl_convert

    script = files(_HERE).joinpath("page.js").read_text(encoding="utf-8")
    return str(vl_convert.javascript_bundle(script))


def page_of(runs: Sequence[RunData], javascript: str) -> str:
    """Return the page about runs.

    Args:
        runs: At least one.
        javascript: From :func:`drawing`.
    """
    return _page(runs, charts_of(runs), javascript)


def write_figures(runs: Sequence[Path], figures: Path) -> None:
    """Write every chart of the page into the directory ``figures``, as PNG and as PDF.

    Raises:
        ConfigError: The extra ``report`` is not installed.
        RunDirectoryError: One is no run directory, or a file is damaged.
    """
    check_can_be_written()
    import vl_convert

    figures.mkdir(parents=True, exist_ok=True)
    for chart in charts_of(read_runs(runs)):
        spec = {**chart.spec, "width": 640, "config": {**config(), "background": "white"}}
        png, pdf = vl_convert.vegalite_to_png(spec, scale=2), vl_convert.vegalite_to_pdf(spec)
        write_atomically(figures / f"{chart.name}.png", png)
        write_atomically(figures / f"{chart.name}.pdf", pdf)


def _page(runs: Sequence[RunData], charts: Sequence[Chart], javascript: str) -> str:
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs beside each other"
    style = files(_HERE).joinpath("page.css").read_text(encoding="utf-8")
    sections = [
        *(_outcome(run) for run in runs),
        *(_samples(run) for run in runs),
        *(_figure(chart) for chart in charts),
        _refusals(runs),
        _privacy(runs),
        _settings(runs),
    ]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>flower-split: {_text(title)}</title>",
            f"<style>{style}</style>",
            f"</head>\n<body>\n<main>\n<h1>{_text(title)}</h1>",
            *filter(None, sections),
            "</main>",
            f'<script type="application/json" id="chart-config">{_json(config())}</script>',
            f'<script type="module">{_script(javascript)}</script>',
            "</body>\n</html>\n",
        ]
    )


def _outcome(run: RunData) -> str:
    clients, overall = run.summary.get("clients"), run.summary.get("overall")
    rows = [row for row in clients if isinstance(row, Mapping)] if isinstance(clients, list) else []
    if isinstance(overall, Mapping):
        rows.append(overall)
    alone = any(row.get("local_own") is not None for row in rows)
    header = ["client", "held-out tokens", "base", "federated", "change"]
    scores = _names_of_scores(rows)
    header += [f"{name}: base, federated" for name in scores]
    header += ["alone: own data", "alone: others' data"] if alone else []
    body = []
    for row in rows:
        base, federated = row.get("base"), row.get("federated")
        cells = [
            str(row.get("client")),
            _show(row.get("num_tokens")),
            _show(base),
            _show(federated),
        ]
        cells.append(
            f"{100 * (federated / base - 1):+.1f} %"
            if isinstance(base, float) and isinstance(federated, float)
            else "–"
        )
        cells += [_before_and_after(row, name) for name in scores]
        body.append(
            cells + ([_show(row.get(n)) for n in ("local_own", "local_others")] if alone else [])
        )
    notes = run.summary.get("notes")
    facts = run.summary.get("facts")
    return _section(
        f"Outcome of {run.name}" if run.summary else f"{run.name} has not finished",
        _table(header, body, total=isinstance(overall, Mapping)) if body else "",
        "".join(f"<p class=note>{_text(str(note))}</p>" for note in notes or ())
        if isinstance(notes, list)
        else "",
        _facts(facts) if isinstance(facts, Mapping) else "",
        f"<p class=path>{_text(str(run.path))}</p>",
    )


def _names_of_scores(rows: Sequence[Mapping[str, Json]]) -> list[str]:
    found = rows[0].get("federated_scores") if rows else None
    return list(found) if isinstance(found, Mapping) else []


def _before_and_after(row: Mapping[str, Json], name: str) -> str:
    found = [row.get("base_scores"), row.get("federated_scores")]
    values = [scores.get(name) if isinstance(scores, Mapping) else None for scores in found]
    return " → ".join(f"{v:.3f}" if isinstance(v, float) else "–" for v in values)


def _samples(run: RunData) -> str:
    """Return how a run continues prompts; empty where nobody asked."""
    if not run.samples:
        return ""
    body = [[sample.prompt, sample.base, sample.trained] for sample in run.samples]
    table = _table(["prompt", "base", "trained"], body)
    return _section(f"Sample generations of {run.name}", f"<div class=samples>{table}</div>")


def _facts(facts: Mapping[str, Json]) -> str:
    items = "".join(
        f"<div><dt>{_text(name)}</dt><dd>{_text(_show(value))}</dd></div>"
        for name, value in facts.items()
    )
    return f"<dl>{items}</dl>"


def _figure(chart: Chart) -> str:
    return (
        f"<section><h2>{_text(chart.title)}</h2><figure>"
        f'<div class="chart" id="{chart.name}"></div>'
        f'<script type="application/json" class="spec" data-chart="{chart.name}">'
        f"{_json(chart.spec)}</script>"
        f"<figcaption>{_text(chart.caption)}</figcaption></figure></section>"
    )


def _refusals(runs: Sequence[RunData]) -> str:
    """Return the table of work that did not count, with its reasons; empty where all of it did."""
    body = []
    for run in runs:
        for kind, field in (("trunk", "left_out"), ("aggregation", "excluded")):
            for record in run.of(kind):
                whose = record.get(field)
                for slot, why in whose.items() if isinstance(whose, Mapping) else ():
                    client = run.clients.get(int(slot), slot)
                    body.append([run.name, str(record["server_round"]), client, kind, str(why)])
    if not body:
        return ""
    header = ["run", "round", "client", "by", "why"]
    return _section("Work that did not count", _table(header, body))


def _privacy(runs: Sequence[RunData]) -> str:
    """Return what the runs that add noise say of it; empty where none does."""
    body = []
    for run in runs:
        mechanism, facts = run.config.get("privacy.mechanism"), run.summary.get("facts")
        if mechanism != "none":
            body.append([run.name, "privacy.mechanism", str(mechanism)])
            known = facts.items() if isinstance(facts, Mapping) else ()
            body += [
                [run.name, name, _show(value)]
                for name, value in known
                if any(word in name.lower() for word in ("epsilon", "ε", "privacy", "noise", "δ"))
            ]
    if not body:
        return ""
    words = "It covers the clients' adapters. What goes to the trunk carries no noise."
    return _section("Privacy", _table(["run", "what", "value"], body), f"<p>{words}</p>")


def _settings(runs: Sequence[RunData]) -> str:
    parts = []
    if len(runs) > 1:
        header = ["key", *(run.name for run in runs)]
        different = [[key, *values] for key, values in differences(runs)]
        parts.append(_table(header, different) if different else "<p>All settings are equal.</p>")
    for run in runs:
        body = [[key, repr(value)] for key, value in run.config.items()]
        body += [[name, str(value)] for name, value in run.versions.items()]
        name = f"All settings of {run.name}"
        parts.append(
            f"<details><summary>{_text(name)}</summary>{_table(['key', 'value'], body)}</details>"
        )
    return _section("Settings that differ" if len(runs) > 1 else "Settings", *parts)


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{''.join(parts)}</section>"


def _table(header: Sequence[str], body: Sequence[Sequence[str]], *, total: bool = False) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    rows = [
        f"<tr{' class=total' if total and index == len(body) - 1 else ''}>"
        + "".join(f"<td>{_text(cell)}</td>" for cell in row)
        + "</tr>"
        for index, row in enumerate(body)
    ]
    inside = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f"<div class=table><table>{inside}</table></div>"


def _show(value: Json) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def _text(value: str) -> str:
    return html.escape(value)


def _json(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("</", "<\\/")


def _script(text: str) -> str:
    return text.replace("</script", "<\\/script")
