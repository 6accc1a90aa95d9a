"""Conformance checks that the author of a plug-in runs in their own tests.

Runs on: The machine of whoever writes a plug-in; no process of a run imports this package.
Read first: ``aggregators.py``, then the extension point's own base class.
"""

from flower_split.testing.aggregators import check_aggregator
from flower_split.testing.codecs import check_codec
from flower_split.testing.data_sources import check_data_source
from flower_split.testing.failures import ConformanceError
from flower_split.testing.loggers import check_logger
from flower_split.testing.partitioners import check_partitioner
from flower_split.testing.reports import check_report
from flower_split.testing.rules import check_rule
from flower_split.testing.transports import check_transport
from flower_split.testing.window_rules import check_window_rule

__all__ = [
    "ConformanceError",
    "check_aggregator",
    "check_codec",
    "check_data_source",
    "check_logger",
    "check_partitioner",
    "check_report",
    "check_rule",
    "check_transport",
    "check_window_rule",
]
