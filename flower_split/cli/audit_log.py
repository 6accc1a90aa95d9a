"""``flower-split audit-log verify``: check that nothing in an audit log was changed."""

from collections.abc import Sequence
from pathlib import Path

from flower_split.trunk.service.audit_log import verify_audit_log


def verify(files: Sequence[Path]) -> int:
    """Check files of one log, oldest first, and print where it ends.

    Raises:
        DataError: A line was changed, taken out or put in; names file and line.
    """
    number, last = verify_audit_log(files)
    print(f"unbroken up to event {number}, hash {last}")
    return 0
