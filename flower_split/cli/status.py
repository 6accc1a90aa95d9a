"""``flower-split status``: who takes part in a trunk's round, who is waited for, how fast it goes."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from flower_split.cli.trunk_login import TrunkLogin
from flower_split.errors import ConfigError, TrunkError
from flower_split.protocol.values import EVALUATION_ENDED, SlotReport, TrunkStatus
from flower_split.runtime.exit_codes import COMPLETED

_MIB = 1 << 20
_LATE = 30.0  # seconds of being waited for that are shown in red


@dataclass(frozen=True, kw_only=True, slots=True)
class StatusCommand:
    """What the command line asks for."""

    trunk: TrunkLogin
    as_json: bool = False
    watch: float | None = None  # seconds between two looks; None: look once

    def __post_init__(self) -> None:
        """Check the values."""
        if self.watch is not None and self.watch < 0.2:
            raise ConfigError(f"--watch must be at least 0.2 seconds; it is {self.watch:g}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """One look at a trunk."""

    status: TrunkStatus
    tokens_per_second: float  # since the look before; of the first: since the round began


def show_status(command: StatusCommand) -> int:
    """Ask once and print; or go on asking until Ctrl-C.

    Raises:
        TrunkError: The trunk does not answer, or refuses the token; while watching it is shown instead.
        ConfigError: The token file or the certificate cannot be read.
    """
    with command.trunk.coordinator() as coordinator:
        if command.watch is not None:
            _watch(coordinator.status, command)
            return COMPLETED
        seen = look(coordinator.status())
    if command.as_json:
        print(as_json(seen))
    else:
        Console().print(picture(command.trunk.address, seen))
    return COMPLETED


def look(status: TrunkStatus, before: TrunkStatus | None = None, seconds: float = 0.0) -> Seen:
    """Return a look with its rate.

    Args:
        status: As the trunk answered.
        before: Its answer before; None: there is none.
        seconds: Between the two.
    """
    done, time_taken = status.num_tokens, status.process.round_seconds
    # A round is evaluated under its own number, and counts from zero again.
    if before is not None and seconds > 0 and _same_round(before, status):
        since = status.num_tokens - before.num_tokens
        done, time_taken = (since, seconds) if since >= 0 else (done, time_taken)
    return Seen(status=status, tokens_per_second=done / time_taken if time_taken > 0 else 0.0)


def as_json(seen: Seen) -> str:
    """Return a look as one line of JSON."""
    return json.dumps({**asdict(seen.status), "tokens_per_second": seen.tokens_per_second})


def picture(address: str, seen: Seen) -> Group:
    """Return a look for the terminal."""
    status, process, kept = seen.status, seen.status.process, seen.status.activations
    if status.max_experiments > 1 and not status.experiment:
        return _of_several(address, status)
    problem = "" if status.problem == EVALUATION_ENDED else status.problem
    phase = status.phase if problem == status.problem else "evaluated"
    head = Text(f"trunk {address}  {phase}", style="bold")
    if status.experiment:
        head.append(
            f"  experiment {status.experiment}  round {status.server_round}  attempt {status.attempt}"
            f"  window {status.window}",
            style="not bold",
        )
    lines = [
        f"{seen.tokens_per_second:,.0f} tokens/s  {status.num_tokens:,.0f} tokens in "
        f"{process.round_seconds:.0f} s  queue {process.queue_seconds:.2f} s",
        f"wire {_size(process.bytes_received)} in, {_size(process.bytes_sent)} out  memory "
        f"{_size(process.resident_bytes)}"
        + (f", GPU {_size(process.accelerator_bytes)}" if process.accelerator_bytes else "")
        + f"  activations {_size(kept.num_bytes)} of {_size(kept.budget_bytes)}",
        f"rounds {process.rounds_committed} committed, {process.rounds_aborted} aborted  up "
        f"{process.uptime_seconds:.0f} s  flower-split {process.package_version}",
    ]
    if status.batches.batches:
        lines.append(
            f"batches {status.batches.batches} in {status.batches.passes} passes, "
            f"{status.batches.partial} without somebody"
        )
    if problem:
        lines.append(f"problem: {problem}")
    return Group(head, *map(Text, lines), _slots(status.slots))


def _of_several(address: str, status: TrunkStatus) -> Group:
    """Return a look at a trunk of several experiments: those of the coordinator that asks."""
    process = status.process
    head = Text(f"trunk {address}  {len(status.experiments)} experiments of yours", style="bold")
    head.append(f"  {status.max_experiments} places in all", style="not bold")
    line = (
        f"memory {_size(process.resident_bytes)}"
        + (f", GPU {_size(process.accelerator_bytes)}" if process.accelerator_bytes else "")
        + f"  queue {process.queue_seconds:.2f} s  up {process.uptime_seconds:.0f} s  flower-split "
        f"{process.package_version}"
    )
    table = Table("experiment", "phase", "round", "clients", "tokens", "computed", "coordinator")
    for one in status.experiments:
        table.add_row(
            one.name,
            one.phase,
            f"{one.server_round}.{one.attempt}",
            str(one.participants),
            f"{one.num_tokens:,.0f}",
            f"{one.compute_seconds:.1f} s",
            f"{one.silent_seconds:.0f} s ago",
        )
    return Group(head, Text(line), table)


def _slots(slots: tuple[SlotReport, ...]) -> Table:
    table = Table("slot", "state", "waited for", "last call", "tokens", "in", "out")
    for slot in slots:
        late = slot.waited_seconds >= _LATE
        table.add_row(
            str(slot.slot),
            _state(slot),
            f"{slot.waited_seconds:.0f} s" if slot.waited_seconds else "",
            f"{slot.silent_seconds:.0f} s ago" if slot.joined else "",
            f"{slot.num_tokens:,.0f}",
            _size(slot.bytes_received),
            _size(slot.bytes_sent),
            style="red" if late or slot.problem else "",
        )
    return table


def _state(slot: SlotReport) -> str:
    if slot.problem:
        return f"left out: {slot.problem}"
    if slot.completed:
        return "done"
    return "in" if slot.joined else "not joined"


def _watch(status: Callable[[], TrunkStatus], command: StatusCommand) -> None:
    """Show looks until Ctrl-C; a trunk that does not answer is shown, and asked again."""
    seconds, before, asked = command.watch or 1.0, None, time.monotonic()
    console = Console()
    with Live(console=console, auto_refresh=False, transient=False) as live:
        while True:
            try:
                found, now = status(), time.monotonic()
                seen = look(found, before, now - asked)
                before, asked = found, now
                if command.as_json:
                    print(as_json(seen), flush=True)
                else:
                    live.update(picture(command.trunk.address, seen), refresh=True)
            except TrunkError as error:
                if command.as_json:
                    print(json.dumps({"error": str(error)}), flush=True)
                else:
                    live.update(
                        Text(f"trunk {command.trunk.address}: {error}", style="red"), refresh=True
                    )
            try:
                time.sleep(seconds)
            except KeyboardInterrupt:
                return


def _same_round(one: TrunkStatus, other: TrunkStatus) -> bool:
    return (one.epoch, one.experiment, one.server_round, one.attempt) == (
        other.epoch,
        other.experiment,
        other.server_round,
        other.attempt,
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / _MIB:,.1f} MiB"
