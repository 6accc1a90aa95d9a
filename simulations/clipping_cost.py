"""Print what clipping over the whole model costs: seconds of a step with it, and with each part by itself.

Runs of the quick-start take turns, so that what else the machine does falls on both alike. A step's seconds
are those that a client computes and waits; the first round of each run, which warms up, is left out. About
two minutes for each pair on two quiet cores:

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
_PARTS = ("compute_seconds", "wait_seconds", "trunk_seconds", "wire_seconds")


def step_seconds(over: str, rounds: int, run_dir: Path) -> list[float]:
    """Return the seconds of all clients' steps in a run's rounds but the first."""
    keys = f'num-server-rounds={rounds} evaluate-every={rounds} train.max-grad-norm-over="{over}"'
    command = ("flower-split", "run", str(QUICKSTART), "--local")
    config = ("--run-config", f'{SETTINGS} {keys} run-dir="{run_dir}"')
    subprocess.run([*command, *config], check=True, stdout=subprocess.DEVNULL)
    return [
        sum(float(str(line[part])) for part in _PARTS)
        for line in read_metrics(run_dir / FILE)
        if line.get("kind") == "step" and int(str(line["server_round"])) > 1
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
                found[over] += step_seconds(over, arguments.rounds, Path(folder, f"{over}-{pair}"))
    for over, seconds in found.items():
        low, middle, high = statistics.quantiles(seconds, n=4)
        print(f"{over:<6} {len(seconds)} steps: {middle:.3f} s (quartiles {low:.3f} to {high:.3f})")
    ratio = statistics.median(found["model"]) / statistics.median(found["part"])
    print(f"model / part: {ratio:.3f}")


if __name__ == "__main__":
    main()
