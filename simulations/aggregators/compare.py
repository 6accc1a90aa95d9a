"""Every aggregation method on the quick-start's model and data, in one process without network.

All methods start from the same adapter, see the same batches and take the same number of steps, in
three federations: equal ranks, mixed ranks, and a quarter of the clients per round. The model is
the unsplit one, which the split one equals; LoRA is on the bottom and the top, as clients hold it.
Prints a table, with what each method does otherwise than its paper; writes it, every round's loss and
a plot to ``--out``.
"""

import argparse
import csv
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from lab import Lab, Outcome, Setting, run
from transformers.utils import logging as transformers_logging

from flower_split.aggregation import METHODS
from flower_split.aggregation.methods.description import describe

Results = dict[tuple[str, str], Outcome]


def _as_in_its_paper(method: str) -> str:
    """Return a method with the options that its paper uses where the defaults differ."""
    return "florist:tau=0.9" if method == "florist" else method


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[*map(_as_in_its_paper, METHODS), "product-delta:rank-weighting=holders"],
        metavar="METHOD",
        help="names, or name:options such as product-delta:rank-weighting=holders",
    )
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--local-steps", type=int, default=6, help="optimizer steps per round")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=64)
    parser.add_argument("--eval-examples", type=int, default=8, help="held out, per client")
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--rank", type=int, default=8, help="of all clients, or the largest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/aggregators"))
    return parser.parse_args(arguments)


def settings_of(arguments: argparse.Namespace) -> list[Setting]:
    """Return the three federations."""
    equal = (arguments.rank,) * arguments.clients
    steps = [max(1, arguments.rank // 4), max(1, arguments.rank // 2), arguments.rank]
    mixed = tuple(steps[index % 3] for index in range(arguments.clients))
    return [
        Setting(name="equal ranks", ranks=equal),
        Setting(name="mixed ranks", ranks=mixed),
        Setting(name="25 % a round", ranks=equal, fraction=0.25),
    ]


def table(results: Results, methods: Sequence[str], settings: Sequence[Setting]) -> str:
    """Return the results as a Markdown table: perplexity, megabytes per client and round, seconds."""
    head = ["method", *(f"perplexity, {one.name}" for one in settings)]
    head += ["kB up", "kB down", "server s", "merged update", "differs from the paper"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    first = settings[0].name
    for method in methods:
        cells = [f"`{method}`"]
        for setting in settings:
            outcome = results.get((method, setting.name))
            cells.append(f"{math.exp(outcome.losses[-1]):.2f}" if outcome else "–")
        outcome = results[method, first]
        shares = (len(outcome.losses) - 1) * len(settings[0].ranks)
        cells += [
            f"{amount / shares / 1e3:.0f}" for amount in (outcome.bytes_up, outcome.bytes_down)
        ]
        about = describe(METHODS[method.partition(":")[0]])
        cells += [f"{outcome.seconds:.2f}", about.exactness, about.deviation or "–"]
        lines.append("| " + " | ".join(cells) + " |")
    start = math.exp(results[methods[0], first].losses[0])
    lines.append("")
    lines.append(
        f"Held-out perplexity over all clients after the last round; before the first it is "
        f"{start:.2f}. Bytes per client and round, seconds over all rounds, at equal ranks."
    )
    return "\n".join(lines)


def write_losses(results: Mapping[tuple[str, str], Outcome], path: Path) -> None:
    """Write every round's loss as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "setting", "round", "loss"])
        for (method, setting), outcome in results.items():
            for server_round, loss in enumerate(outcome.losses):
                writer.writerow([method, setting, server_round, f"{loss:.6f}"])


def plot(results: Results, settings: Sequence[Setting], path: Path) -> bool:
    """Loss against round and against bytes; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(settings), figsize=(6 * len(settings), 5), sharey=True)
    colours = pyplot.get_cmap("tab20")
    methods = list(dict.fromkeys(method for method, _ in results))
    for axis, setting in zip(axes, settings, strict=True):
        for index, method in enumerate(methods):
            outcome = results.get((method, setting.name))
            if outcome:
                axis.plot(outcome.losses, label=method, color=colours(index), linewidth=1.5)
        axis.set_title(setting.name)
        axis.set_xlabel("round")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out loss per token")
    axes[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))  # covers no line
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def main(arguments: Sequence[str]) -> None:
    """Run, print, write."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    transformers_logging.disable_progress_bar()
    options.out.mkdir(parents=True, exist_ok=True)
    settings = settings_of(options)
    lab = Lab(options, {rank for setting in settings for rank in setting.ranks})
    results: Results = {}
    for method in options.methods:
        for setting in settings:
            if len(set(setting.ranks)) > 1 and not METHODS[method.partition(":")[0]].mixed_ranks:
                continue
            outcome = results[method, setting.name] = run(lab, method, setting)
            print(
                f"{method}, {setting.name}: perplexity {math.exp(outcome.losses[0]):.2f} -> "
                f"{math.exp(outcome.losses[-1]):.2f}",
                file=sys.stderr,
                flush=True,
            )
    text = table(results, options.methods, settings)
    print(text)
    (options.out / "table.md").write_text(text + "\n", encoding="utf-8")
    write_losses(results, options.out / "losses.csv")
    if plot(results, settings, options.out / "losses.png"):
        print(f"\nwritten to {options.out}: table.md, losses.csv, losses.png", file=sys.stderr)
    else:
        print("\nno plot: pip install 'flower-split[plot]'", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
