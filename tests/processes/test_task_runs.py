"""Every task by the command: real client and trunk processes; numbers are those of the same apps in one."""

from pathlib import Path

import pytest

from flower_split.results.frames import load
from tests.acceptance.test_tasks import job
from tests.support.flower_home import Flower
from tests.support.task_runs import RUNS, TaskRun
from tests.support.tiny_app import make_app

SCORES = {
    "sequence-classification": {"accuracy", "f1"},
    "token-classification": {"accuracy", "f1"},
    "question-answering": {"exact_match", "f1"},
    "seq2seq": {"accuracy", "exact_match"},
    "masked-lm": {"accuracy"},
    "causal-lm": set(),
    "image-classification": {"accuracy", "f1"},
    "image-text-to-text": set(),
}


@pytest.mark.slow  # nine runs
@pytest.mark.parametrize("case", RUNS, ids=str)
def test_run_of_a_task_ends_with_its_scores(flower: Flower, tmp_path: Path, case: TaskRun) -> None:
    app = make_app(
        tmp_path / "app",
        job(tmp_path, case, **{"trunk.step-every": "local-step", "train.local-steps": 10}),
    )
    done = flower.command("flower-split", "run", str(app), "--local")
    assert done.returncode == 0, done.stdout
    frames = load(tmp_path / "run")
    for kind in ("evaluation", "round"):
        found = set(frames[kind].columns) & {"accuracy", "f1", "exact_match"}
        assert found == SCORES[case.task]
    for name in SCORES[case.task]:
        assert f"{name}: base" in (tmp_path / "run" / "report.md").read_text()
        assert frames["round"][name].iloc[-1] == frames["evaluation"][name].iloc[-1]  # one test set
    losses = frames["round"]["eval_loss"].tolist()
    assert losses[-1] < losses[0]
