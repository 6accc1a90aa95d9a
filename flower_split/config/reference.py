"""The configuration reference as Markdown, printed from the dataclasses and their field docs."""

import ast
import inspect
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass

from flower_split.config.run import RunConfig
from flower_split.config.validation import kebab


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfigKey:
    """One run-config key."""

    key: str  # such as trunk.optimizer.learning-rate
    kind: str  # bool, int, float or str
    default: bool | int | float | str
    meaning: str  # one line, with its unit


def config_keys() -> list[ConfigKey]:
    """Return every run-config key in field order, a section's own keys before its subsections'."""
    return list(_keys(RunConfig, ""))


def config_reference() -> str:
    """Return the reference of all run-config keys as Markdown: a table per section.

    Headings begin at the second level, so that the text can be put under a page's title.
    """
    sections: dict[str, list[ConfigKey]] = {}
    for item in config_keys():
        sections.setdefault(item.key.rpartition(".")[0], []).append(item)
    return "\n".join(_section(name, items) for name, items in sections.items())


def _section(name: str, items: list[ConfigKey]) -> str:
    title = f"`{name}`" if name else "The run"
    rows = [
        f"| `{item.key}` | {item.kind} | `{_literal(item.default)}` | {_escaped(item.meaning)} |"
        for item in items
    ]
    return "\n".join(
        [f"## {title}", "", "| key | type | default | meaning |", "|---|---|---|---|", *rows, ""]
    )


def _keys(section: type, prefix: str) -> Iterator[ConfigKey]:
    hints, meanings = typing.get_type_hints(section), field_docs(section)
    nested = []
    for item in fields(section):
        key, hint = prefix + kebab(item.name), hints[item.name]
        if is_dataclass(hint):
            nested.append((typing.cast(type, hint), key + "."))
        elif item.default is not MISSING:
            yield ConfigKey(
                key=key, kind=hint.__name__, default=item.default, meaning=meanings[item.name]
            )
    for subsection, inner in nested:
        yield from _keys(subsection, inner)


def field_docs(section: type) -> dict[str, str]:
    """Return field name -> the string that follows the field in the class's source, as one line.

    Raises:
        OSError: The package was installed without its source.
    """
    [body] = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for item, after in zip(body.body, body.body[1:], strict=False):
        if not (isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)):
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            found[item.target.id] = " ".join(str(after.value.value).split())
    return found


def _literal(value: bool | int | float | str) -> str:
    """Write a default as TOML does."""
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
