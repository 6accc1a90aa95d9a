"""What the exit status of ``flower-split`` says."""

from collections.abc import Mapping

COMPLETED, FAILED, WRONG_USE, LOST_CONTACT, STOPPED, DETACHED = range(6)

EXIT_CODES: Mapping[int, str] = {
    COMPLETED: "done; of a run: it completed",
    FAILED: "the job failed; of a run: it failed",
    WRONG_USE: "the command line or the configuration is wrong; nothing was started",
    LOST_CONTACT: "the SuperLink does not answer any more; whether the run goes on is not known",
    STOPPED: "the run was stopped: by Ctrl-C, SIGTERM or flwr stop",
    DETACHED: "the run goes on without this command: a second Ctrl-C, or it did not stop in time",
}
"""Exit code -> what it says."""

STILL_AT_WORK = (LOST_CONTACT, DETACHED)
"""Exit codes after which a run, and the SuperLink it was given, may go on."""


def exit_code_table() -> str:
    """Return :data:`EXIT_CODES` as lines for ``--help``."""
    return "\n".join(f"  {code}  {meaning}" for code, meaning in EXIT_CODES.items())
