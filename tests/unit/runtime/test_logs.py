"""Log lines: this package's errors are paragraphs in Flower's log too."""

import json
import logging
import sys

import pytest

from flower_split.errors import ConfigError, DataError
from flower_split.runtime.log_fields import PROCESS_FIELDS
from flower_split.runtime.logs import JsonLines, LogSettings, OwnErrorsAsParagraphs, TimedLines


def logged(error: Exception, caplog: pytest.LogCaptureFixture) -> str:
    """What is logged of an error as Flower's simulation logs it."""
    logger = logging.getLogger("tests.as-flower")
    logger.addFilter(OwnErrorsAsParagraphs())
    formatter = logging.Formatter("%(message)s")
    with caplog.at_level(logging.ERROR, logger.name):
        try:
            raise error
        except Exception as raised:
            logger.log(logging.ERROR, "%s raised an exception", "Simulation", exc_info=raised)
    return formatter.format(caplog.records[-1])


def test_an_error_of_this_package_is_one_paragraph(caplog: pytest.LogCaptureFixture) -> None:
    text = logged(DataError("data.path does not exist. Correct it."), caplog)
    assert text == ("Simulation raised an exception: data.path does not exist. Correct it.")


def test_any_other_error_keeps_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    assert "Traceback" in logged(ZeroDivisionError("x"), caplog)


def record_of(text: str, **fields: object) -> logging.LogRecord:
    """A record made at a known time."""
    record = logging.makeLogRecord({"name": "flower_split.x", "msg": text, **fields})
    record.levelname, record.created = "INFO", 1_600_000_000.25
    return record


def test_json_lines_have_utc_time_and_the_fields_of_the_round() -> None:
    PROCESS_FIELDS.clear()  # of what another test's run bound
    try:
        PROCESS_FIELDS.bind(experiment="e", run=7, round=2, attempt=0, slot=1)
        line = json.loads(JsonLines().format(record_of("two\nlines", slot=3)))
    finally:
        PROCESS_FIELDS.clear()
    assert line == {
        "time": "2020-09-13T12:26:40.250Z",
        "level": "info",
        "logger": "flower_split.x",
        "message": "two\nlines",
        "experiment": "e",
        "run": 7,
        "round": 2,
        "attempt": 0,
        "slot": 3,
    }
    assert "experiment" not in json.loads(JsonLines().format(record_of("later")))


def test_json_line_of_an_error_is_one_line_with_its_traceback() -> None:
    try:
        raise ZeroDivisionError("x")
    except ZeroDivisionError:
        text = JsonLines().format(record_of("failed", exc_info=sys.exc_info()))
    assert "\n" not in text and "ZeroDivisionError: x" in json.loads(text)["error"]


def test_timed_lines_begin_with_utc() -> None:
    assert TimedLines().format(record_of("m")) == "2020-09-13T12:26:40.250Z INFO m"


def test_log_settings_come_from_the_environment_or_are_refused() -> None:
    given = {"FLOWER_SPLIT_LOG_LEVEL": "DEBUG", "FLOWER_SPLIT_LOG_FORMAT": "json"}
    assert LogSettings.from_environment(given) == LogSettings(level="debug", form="json")
    assert LogSettings.from_environment({}) == LogSettings()
    with pytest.raises(ConfigError, match="'loud'"):
        LogSettings.from_environment({"FLOWER_SPLIT_LOG_LEVEL": "loud"})


def test_field_that_lines_do_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="token"):
        PROCESS_FIELDS.bind(token="secret")
