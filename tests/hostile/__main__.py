"""``python -m tests.hostile``: every attack on a trunk of its own, as a table; 1 if one succeeds."""

import argparse
import logging
import sys

import torch

from tests.hostile.arena import Outcome, trunk_apart
from tests.hostile.attacks import ATTACKS

HEAD = ("attack", "answers", "quiet", "attacked", "ratio", "memory", "weights")
ROW = "{:11} {:48} {:50} {:>7} {:>8} {:>6} {:>7} {:>7}  {}"


def row(outcome: Outcome, verdict: list[str]) -> str:
    """One line of the table."""
    answers = ", ".join(f"{code} {count}" for code, count in sorted(outcome.answers.items()))
    return ROW.format(
        outcome.attack.point,
        outcome.attack.name,
        answers,
        f"{1000 * outcome.quiet:.0f} ms",
        f"{1000 * outcome.attacked:.0f} ms",
        f"{outcome.ratio:.2f}",
        f"{outcome.growth / 2**20:+.1f}",
        "equal" if outcome.same_digest else "DIFFER",
        "; ".join(verdict) or "held",
    )


def main() -> int:
    """Run the attacks that the command line names; all of them without a name."""
    parser = argparse.ArgumentParser(prog="python -m tests.hostile")
    parser.add_argument("--attack", action="append", help="a part of names; may be given again")
    parser.add_argument("--list", action="store_true", help="print the names")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("flower_split").setLevel(logging.ERROR)
    wanted = arguments.attack or [""]
    attacks = [item for item in ATTACKS if any(part in item.name for part in wanted)]
    if arguments.list:
        print("\n".join(f"{item.point}: {item.name}" for item in attacks))
        return 0
    print(ROW.format("threat", *HEAD, "verdict"))
    succeeded = 0
    with trunk_apart() as arena:
        for attack in attacks:
            outcome = arena.run(attack)
            verdict = arena.verdict(outcome)
            succeeded += bool(verdict)
            print(row(outcome, verdict), flush=True)
    print(f"{len(attacks)} attacks, {succeeded} succeeded")
    return 1 if succeeded else 0


if __name__ == "__main__":
    sys.exit(main())
