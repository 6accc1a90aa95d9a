"""Print what clipping over the whole model costs: seconds of a round with it, and with each part by itself.

Runs of the quick-start take turns, so that what else the machine does falls on both alike; a round's
seconds are those of training alone. The first round of each run, which warms up, and the last, which
evaluates, are left out. About two minutes for each pair on two quiet cores:

    python simulations/clipping_cost.py --pairs 3
"""

import argparse
import statistics
import subprocess
import tempfile
from pathlib import Path

from flower_split.runs.metrics import FILE, read_metrics

QUICKSTART = Path(__file__).parent / "quickstart"
SETTINGS = "local-only-baseline=false data.max-eval-batches=1 report='' join-timeout=900.0"
OVER = ("part", "model")


def round_seconds(over: str, rounds: int, run_dir: Path) -> list[float]:
    """Return the seconds of a run's rounds but the first and the last."""
    keys = f'num-server-rounds={rounds} evaluate-every={rounds} train.max-grad-norm-over="{over}"'
    command = ("flower-split", "run", str(QUICKSTART), "--local")
    config = ("--run-config", f'{SETTINGS} {keys} run-dir="{run_dir}"')
    subprocess.run([*command, *config], check=True, stdout=subprocess.DEVNULL)
    rounds_only = [line for line in read_metrics(run_dir / FILE) if line.get("kind") == "round"]
    return [
        float(str(line["seconds"]))
        for line in rounds_only
        if "seconds" in line and 1 < int(str(line["server_round"])) < rounds
    ]


def main() -> None:
    """Print the medians and their ratio."""
    parser = argparse.ArgumentParser(prog="python simulations/clipping_cost.py")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    found: dict[str, list[float]] = {over: [] for over in OVER}
    with tempfile.TemporaryDirectory() as folder:
        for pair in range(arguments.pairs):
            for over in OVER if pair % 2 == 0 else OVER[::-1]:
                found[over] += round_seconds(over, arguments.rounds, Path(folder, f"{over}-{pair}"))
    for over, seconds in found.items():
        low, middle, high = statistics.quantiles(seconds, n=4)
        print(
            f"{over:<6} {len(seconds)} rounds: {middle:.2f} s (quartiles {low:.2f} to {high:.2f})"
        )
    ratio = statistics.median(found["model"]) / statistics.median(found["part"])
    print(f"model / part: {ratio:.3f}")


if __name__ == "__main__":
    main()
