"""The error of a plug-in that does not keep its contract, and how checks raise it."""

from collections.abc import Callable

from flower_split.errors import FlowerSplitError


class ConformanceError(AssertionError):
    """A plug-in breaks its contract; the message names the contract and what was seen."""


def require(holds: bool, subject: str, contract: str) -> None:
    """Check one clause of a contract.

    Args:
        holds: Whether it is kept.
        subject: The plug-in, as the subject of the sentence.
        contract: What it must do, as the rest of the sentence.

    Raises:
        ConformanceError: It is not kept.
    """
    if not holds:
        raise ConformanceError(f"{subject} must {contract}.")


def require_refusal(
    call: Callable[[], object], error: type[FlowerSplitError], subject: str, contract: str
) -> None:
    """Check that ``call`` raises ``error``.

    Raises:
        ConformanceError: It returns, or raises something else.
    """
    try:
        call()
    except error:
        return
    except Exception as other:  # whatever a plug-in raises is the finding
        raise ConformanceError(
            f"{subject} must {contract}; it raised {type(other).__name__}: {other}"
        ) from other
    raise ConformanceError(f"{subject} must {contract}; it returned.")
