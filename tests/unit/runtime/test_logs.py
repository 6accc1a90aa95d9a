"""Log lines: this package's errors are paragraphs in Flower's log too."""

import logging

import pytest

from flower_split.errors import DataError
from flower_split.runtime.logs import OwnErrorsAsParagraphs


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
