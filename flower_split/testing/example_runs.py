"""Run directories made for checks, as a run of two clients leaves them."""

from collections.abc import Mapping
from pathlib import Path

from flower_split.config import RunConfig
from flower_split.runs.directory import RunDirectory
from flower_split.runs.files import Json
from flower_split.runs.summary import ClientOutcome, HeldOut, summarize

ROUNDS = 2
_CLIENTS = ("sea", "land")


def make_run(path: Path, rounds: int) -> Path:
    """Write the directory of a run that has come so far; it is finished after all its rounds."""
    run = RunDirectory.create(RunConfig(run_dir=str(path), num_server_rounds=ROUNDS))
    append_lines(run, rounds)
    if rounds == ROUNDS:
        outcomes = [
            ClientOutcome(partition_id=slot, before=HeldOut(9, 4), after=HeldOut(7, 4), name=name)
            for slot, name in enumerate(_CLIENTS)
        ]
        run.write_outcome(summarize(outcomes), facts={"seconds": 4.0}, notes=["A note."])
    return path


def append_lines(run: RunDirectory, rounds: int) -> None:
    """Append the lines of a run that has come so far; 0: none of its rounds, not even the first."""
    for slot, name in enumerate(_CLIENTS):
        sizes = {"num_examples": 5, "num_eval_examples": 2, "planned_steps": 1}
        run.append("data", {"server_round": 0, "partition_id": slot, "name": name, **sizes})
    for number in range(rounds and rounds + 1):
        for slot in range(len(_CLIENTS)):
            for kind, record in _client_lines(number):
                run.append(kind, {"server_round": number, "partition_id": slot, **record})
        losses = {"train_loss": 3.0, "perplexity": 8.0 - number} if number else {}
        run.append("round", {"server_round": number, "seconds": 2.0, **losses})
        if number:
            left_out = {"1": "its gradient was not finite"} if number == 1 else {}
            run.append("trunk", {"server_round": number, "attempt": 0, "left_out": left_out})


def _client_lines(number: int) -> list[tuple[str, Mapping[str, Json]]]:
    held_out = {"loss_sum": 9.0 - number, "num_tokens": 4, "perplexity": 8.0 - number}
    lines: list[tuple[str, Mapping[str, Json]]] = [("evaluation", held_out)]
    if number:
        lines.append(("step", {"step": 0, "loss": 3.0, "num_tokens": 7, "compute_seconds": 0.5}))
        lines.append(("bytes", {"activations_up": 1000, "adapters_down": 10}))
    return lines
