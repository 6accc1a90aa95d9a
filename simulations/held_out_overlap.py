"""Print how much of the quick-start's held-out text repeats training text, before and after.

Run it as ``python simulations/held_out_overlap.py``; nothing is trained.
"""

import argparse

from flower_split.data.documents import Text
from flower_split.data.held_out import split_held_out
from flower_split.data.near_duplicates import COVERED, coverage, without_repeats
from flower_split.data.stdlib_docs import area_docstrings


def main() -> None:
    """Print one line for each client."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-fraction", type=float, default=0.2)
    arguments = parser.parse_args()
    print(f"{'client':<18} {'train':>6} {'held out':>9} {'covered':>8} {'left':>5} {'covered':>8}")
    for number in range(arguments.clients):
        area = area_docstrings(number, arguments.clients)
        documents = [Text(area.name, text) for text in area.docstrings]
        train, before = split_held_out(documents, arguments.eval_fraction, arguments.seed)
        after = without_repeats(before, train)
        shares = [
            sum(share > COVERED for share in coverage(side, train)) / max(len(side), 1)
            for side in (before, after)
        ]
        print(
            f"{area.name:<18} {len(train):>6} {len(before):>9} {shares[0]:>8.1%} {len(after):>5} "
            f"{shares[1]:>8.1%}"
        )


if __name__ == "__main__":
    main()
