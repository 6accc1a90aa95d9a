"""Every key that takes a plug-in's name takes an import path, and says what is wrong with one."""

from typing import Any

import pytest

from flower_split.aggregation import AGGREGATORS
from flower_split.aggregation.rules.parse import RULES
from flower_split.data import DATA_SOURCES
from flower_split.results.report.report import REPORTS
from flower_split.runs.loggers.registry import LOGGERS
from flower_split.runtime.registry import Registry
from flower_split.trunk.engine.window_rules import WINDOW_RULES
from flower_split.wire.codecs import CODECS, GRADIENT_CODECS
from flower_split.wire.transports import TRANSPORTS

REGISTRIES: dict[str, Registry[Any]] = {
    "strategy.aggregator": AGGREGATORS,
    "the rule": RULES,
    "data.source": DATA_SOURCES,
    "report": REPORTS,
    "train.report-to": LOGGERS,
    "trunk.window-rule": WINDOW_RULES,
    "trunk.wire-dtype": CODECS,
    "trunk.gradient-wire-dtype": GRADIENT_CODECS,
    "trunk.transport": TRANSPORTS,
}


@pytest.mark.parametrize("key", REGISTRIES)
def test_an_import_path_stands_for_its_object_and_a_wrong_one_says_why(key: str) -> None:
    registry = REGISTRIES[key]
    assert registry.key == key
    for found in registry.built_in.values():
        assert registry.get(f"{found.__module__}:{found.__qualname__}") is found
    for path, words in (
        (
            "no_such_module:Mine",
            "cannot be imported: ModuleNotFoundError.* must be importable where",
        ),
        ("json:Mine", "cannot be imported: AttributeError"),
        ("math:pi", "must be .*; it is 3.14"),
        ("json", 'is unknown.*or give an import path "module:object"'),
    ):
        with pytest.raises(registry.error, match=f"{key} .*'{path}'.*{words}"):
            registry.get(path)
