"""Data sources by name: those built in, and those of installed distributions."""

from types import MappingProxyType
from typing import TypeGuard

from flower_split.data.source import DataSource
from flower_split.data.sources.documentation import DocumentationSource
from flower_split.data.sources.json_lines import JsonLinesSource
from flower_split.data.sources.tables import CsvSource, HubSource, ParquetSource, SavedSource
from flower_split.data.sources.text import TextSource
from flower_split.errors import ConfigError
from flower_split.runtime.registry import Registry

BUILT_IN: dict[str, type[DataSource]] = {
    "stdlib-docs": DocumentationSource,
    "text": TextSource,
    "jsonl": JsonLinesSource,
    "csv": CsvSource,
    "parquet": ParquetSource,
    "saved": SavedSource,
    "hub": HubSource,
}


def _is_source(found: object) -> TypeGuard[type[DataSource]]:
    return isinstance(found, type) and issubclass(found, DataSource)


DATA_SOURCES: Registry[type[DataSource]] = Registry(
    group="flower_split.data_sources",
    key="data.source",
    form="a subclass of flower_split.data.DataSource",
    machines="the clients run",
    built_in=MappingProxyType(BUILT_IN),
    accepts=_is_source,
    error=ConfigError,
)
