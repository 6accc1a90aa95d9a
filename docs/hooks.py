"""What the site prints from the code: configuration, command, protocol, aggregation methods.

MkDocs calls :func:`on_files` once per build, and :func:`on_page_markdown` for every page.
"""

import argparse
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

if typing.TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

from flower_split.cli.main import make_parser
from flower_split.config.combinations import combinations_table
from flower_split.config.reference import config_reference
from flower_split.runs.metrics import COMMON, SCHEMA
from flower_split.runs.resuming import MAY_CHANGE
from flower_split.runtime.exit_codes import EXIT_CODES

ROOT = Path(__file__).parents[1]
ROLE = re.compile(r":(?:class|data|func|meth|mod|attr):<code>~?([\w.]+)</code>")
PROTO = ROOT / "proto" / "flower_split" / "proto" / "trunk.proto"


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """Add the printed pages to the site's files."""
    from mkdocs.structure.files import File  # here, so that tests need no MkDocs

    pages = {
        "reference/command.md": command_page(),
        "reference/configuration.md": configuration_page(),
        "reference/combinations.md": combinations_page(),
        "reference/metrics.md": metrics_page(),
        "reference/protocol.md": protocol_page(PROTO.read_text(encoding="utf-8")),
    }
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: "Page", config: "MkDocsConfig", files: "Files") -> str:
    """Put what is printed from the code where a page says ``<!-- printed: NAME -->``."""
    for name, table in PRINTED_TABLES.items():
        mark = f"<!-- printed: {name} -->"
        if mark in markdown:
            markdown = markdown.replace(mark, table())
    return markdown


def on_page_content(html: str, page: "Page", config: "MkDocsConfig", files: "Files") -> str:
    """Show a docstring's ``:class:`~package.Name``` as the name alone."""
    return ROLE.sub(lambda found: f"<code>{found[1].rpartition('.')[2]}</code>", html)


def aggregators_table() -> str:
    """Return every aggregation method with its paper and what differs from it."""
    from flower_split.aggregation import METHODS  # here, as it loads torch
    from flower_split.aggregation.methods.description import method_table

    return method_table(METHODS.values())


def exit_codes_table() -> str:
    """Return what each exit status of ``flower-split`` says."""
    rows = [f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items()]
    return "\n".join(["| exit status | meaning |", "|---:|---|", *rows])


def resume_keys_table() -> str:
    """Return the keys that may differ when a run is resumed."""
    rows = [f"| `{key}` | {_cell(what)} |" for key, what in MAY_CHANGE.items()]
    return "\n".join(["| key | what may change |", "|---|---|", *rows])


PRINTED_TABLES: Mapping[str, Callable[[], str]] = {
    "aggregators": aggregators_table,
    "exit-codes": exit_codes_table,
    "resume-keys": resume_keys_table,
}

METRICS = """# Metrics

Printed from `flower_split/runs/metrics.py`. A run writes `metrics.jsonl` into its directory: one JSON
object per line, appended while the run goes on. Names are in snake_case, numbers have the units given
below; what was not measured is left out, and NaN and infinities are null.

`flower_split.results.load(run)` returns one pandas DataFrame for each kind of line:

```python
from flower_split.results import load

frames = load("runs/my-run")
frames["round"].plot(x="server_round", y="perplexity")
```

"""


def metrics_page() -> str:
    """Return every kind of line of ``metrics.jsonl`` with its fields."""
    lines = [METRICS, "## On every line", "", *_fields(COMMON)]
    for name, kind in SCHEMA.items():
        phase = f"Phase `{kind.phase}` where the line names no other."
        lines += ["", f"## `{name}`", "", f"{kind.about[0].upper()}{kind.about[1:]}. {phase}", ""]
        lines += _fields(kind.fields)
    return "\n".join(lines) + "\n"


def _fields(fields: Mapping[str, str]) -> Iterator[str]:
    yield from ("| field | meaning |", "|---|---|")
    for name, meaning in fields.items():
        yield f"| `{name}` | {_cell(meaning)} |"


def command_page() -> str:
    """Return every subcommand of ``flower-split`` with its arguments."""
    parser = make_parser()
    lines = ["# Command", "", f"{parser.description}", "", *_verbatim(parser.epilog)]
    for name, sub, summary in _subcommands(parser):
        lines += [f"## `flower-split {name}`", "", f"{summary[0].upper()}{summary[1:]}.", ""]
        if sub.description:
            lines += [sub.description, ""]
        lines += ["| argument | meaning |", "|---|---|"]
        for action in sub._actions:
            if not isinstance(action, argparse._HelpAction):
                lines.append(f"| {_spelled(action)} | {_cell(action.help or '')} |")
        lines += ["", *_verbatim(sub.epilog)]
    return "\n".join(lines)


def _verbatim(text: str | None) -> list[str]:
    return ["```text", text.strip(), "```", ""] if text else []


def _subcommands(
    parser: argparse.ArgumentParser,
) -> Iterator[tuple[str, argparse.ArgumentParser, str]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, sub in action.choices.items():
                yield name, sub, helps.get(name, "")
                for inner, kind, summary in _subcommands(sub):
                    yield f"{name} {inner}", kind, summary


def _spelled(action: argparse.Action) -> str:
    names = action.option_strings or [action.dest]
    value = action.metavar or action.dest.upper()
    takes = "" if not action.option_strings or action.nargs == 0 else f" {value}"
    return ", ".join(f"`{name}{takes}`" for name in names)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("%%", "%")


CONFIGURATION = """# Configuration

Printed from the dataclasses of `flower_split/config`. A key is written in the app's
`[tool.flwr.app.config]` (every one is there, with a comment, in
`simulations/quickstart/pyproject.toml`), or given for one run with
`--run-config 'num-server-rounds=5 mode="frozen"'`. An unknown key is refused with the nearest known
name, a value that breaks its rule with the rule. Defaults below are those of the package; the
quick-start's app sets some of its own.

Keys under `app.` are yours: nothing here reads or checks them. Your data source has them in
`SourceRequest.app`, your strategy and your functions of the ServerApp in `config.app`, without the
prefix and as they were written; your ClientApp's mods in Flower's `context.run_config`. A resumed run
must have the same ones.

"""


def configuration_page() -> str:
    """Return every run-config key with type, default and meaning, a table per section."""
    return CONFIGURATION + config_reference()


COMBINATIONS = """# Combinations

What a run config may not combine, printed from `flower_split/config/combinations.py`. The command and
the ServerApp check all of it before a run begins, and one message names every problem that there is,
with the values that were given.

"""


def combinations_page() -> str:
    """Return what may not be combined, with the reason and the remedy."""
    return COMBINATIONS + combinations_table()


def protocol_page(proto: str) -> str:
    """Return the trunk's protocol: its methods as a table, and every message as it is defined.

    Args:
        proto: The text of ``trunk.proto``.
    """
    head, _, rest = proto.partition('syntax = "proto3";')
    sections = re.split(r"^// -{10,} (.+)$", rest, flags=re.MULTILINE)
    lines = ["# Protocol", "", *_prose(head), ""]
    lines += [
        "Printed from `proto/flower_split/proto/trunk.proto`; generate other languages' clients from it.",
        "",
    ]
    lines += ["## Methods", "", "| method | request | reply | |", "|---|---|---|---|"]
    lines += _methods(sections[0])
    for title, body in zip(sections[1::2], sections[2::2], strict=True):
        lines += ["", f"## {title[0].upper()}{title[1:]}", "", "```proto", body.strip(), "```"]
    return "\n".join(lines) + "\n"


def _prose(comment: str) -> list[str]:
    return [line.removeprefix("//").strip() for line in comment.strip().splitlines()]


def _methods(service: str) -> Iterator[str]:
    remark: list[str] = []
    for line in service.splitlines():
        found = re.match(r"\s*rpc (\w+)\((stream )?(\w+)\) returns \((stream )?(\w+)\);", line)
        if found:
            name, ask_many, ask, answer_many, answer = found.groups()
            sides = (_side(ask, ask_many), _side(answer, answer_many))
            yield f"| `{name}` | {sides[0]} | {sides[1]} | {_cell(' '.join(remark))} |"
            remark = []
        elif line.strip().startswith("// ---"):
            remark = []
        elif line.strip().startswith("//"):
            remark.append(line.strip().removeprefix("//").strip())


def _side(message: str, streamed: str | None) -> str:
    return f"stream of `{message}`" if streamed else f"`{message}`"
