"""Scores of generated text: those of the unsplit model's own texts, by the libraries' own figures."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu
from transformers import AutoProcessor, AutoTokenizer, PreTrainedModel

from flower_split.config import Scalar, parse_run_config
from flower_split.errors import ConfigError, FlowerSplitError
from flower_split.experiments.baselines import run_baseline
from flower_split.runs.directory import RunDirectory
from tests.acceptance.test_tasks import (
    CLIENTS,
    finished,
    job,
    trunk_in_this_process,  # noqa: F401  (a fixture)
    unsplit,
)
from tests.support.task_runs import RUNS, TaskRun

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries, on models this small
CASES = [run for run in RUNS if run.task in ("causal-lm", "seq2seq", "image-text-to-text")]
SCORES = ("rouge1", "rouge2", "rouge_l", "bleu", "text_exact_match")


def scored_job(tmp_path: Path, case: TaskRun, **changes: Scalar) -> dict[str, Scalar]:
    wanted = {
        "evaluation.text-scores": "rouge, bleu, exact-match",
        "evaluation.max-new-tokens": 6,
        **changes,
    }
    return job(tmp_path, case, **wanted)


def rows_of(tmp_path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]


def texts(model: PreTrainedModel, case: TaskRun, tmp_path: Path) -> list[str]:
    """What the unsplit model makes of each prompt by itself, greedily, at most six tokens."""
    base, said = tmp_path / "base", []
    tokenizer = AutoTokenizer.from_pretrained(base)
    for row in rows_of(tmp_path):
        if case.task == "image-text-to-text":
            image = Image.open(tmp_path / row["image"])
            processor = AutoProcessor.from_pretrained(base)
            text = "<image>\n" + row["prompt"]
            batch = dict(processor(images=image, text=text, return_tensors="pt"))
        else:
            batch = dict(tokenizer(row["prompt"], return_tensors="pt"))
        with torch.no_grad():
            made = model.generate(**batch, max_new_tokens=6, do_sample=False, eos_token_id=5)
        start = 0 if case.task == "seq2seq" else batch["input_ids"].shape[1]
        said.append(tokenizer.decode(made[0, start:], skip_special_tokens=True))
    return said


def library_scores(said: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    kinds = ["rouge1", "rouge2", "rougeL"]
    rouge = [RougeScorer(kinds).score(w, s) for s, w in zip(said, wanted, strict=True)]
    scores = {kind: sum(one[kind].fmeasure for one in rouge) / len(rouge) for kind in kinds}
    scores["rouge_l"] = scores.pop("rougeL")
    right = sum(s == w for s, w in zip(said, wanted, strict=True))
    return scores | {
        "bleu": corpus_bleu(said, [wanted]).score,
        "text_exact_match": right / len(said),
    }


@pytest.mark.parametrize("case", CASES, ids=str)
def test_text_scores_of_a_run_are_those_of_the_unsplit_models_texts(
    tmp_path: Path, case: TaskRun
) -> None:
    done = finished(scored_job(tmp_path, case))
    said = texts(unsplit(done, case, tmp_path), case, tmp_path)
    wanted = [row["completion"] for row in rows_of(tmp_path)]
    expected = library_scores(said, wanted)
    assert 0.1 < expected["rouge1"] < 1 or case.task == "image-text-to-text"
    assert len(set(said)) > 1 and expected["rouge_l"] > 0.1
    lines = [e for e in done.metrics("evaluation") if e["server_round"] == 1]
    assert len(lines) == CLIENTS  # both have the test set
    for line in lines:
        assert {name: line[name] for name in SCORES} == pytest.approx(expected)
    # Both clients' texts together: smoothing gives a corpus of every record twice another BLEU.
    together = library_scores(said * CLIENTS, wanted * CLIENTS)
    scores = done.summary()["overall"]["federated_scores"]  # type: ignore[index, call-overload]
    for found in (done.metrics("round")[-1], scores):
        assert {name: found[name] for name in SCORES} == pytest.approx(together)
    assert "rouge_l: base, federated" in (done.path / "report.md").read_text()


def test_the_first_prompts_alone_are_continued_and_a_baseline_scores_the_same_ones(
    tmp_path: Path,
) -> None:
    [case] = [c for c in CASES if c.task == "seq2seq"]
    config = scored_job(tmp_path, case, **{"evaluation.max-prompts": 3, "train.local-steps": 1})
    done = finished(config)
    before = [e for e in done.metrics("evaluation") if e["server_round"] == 0]
    assert [e["sums"]["count-text-records"] for e in before] == [3, 3]  # type: ignore[index, call-overload]
    run_baseline("alone", parse_run_config({**config, "run-dir": str(tmp_path / "alone")}))
    alone = RunDirectory.open(tmp_path / "alone").metrics("evaluation")[:CLIENTS]
    for mine, theirs in zip(before, alone, strict=True):  # the same base model, split and whole
        assert {name: mine[name] for name in SCORES} == {name: theirs[name] for name in SCORES}


def test_running_text_has_no_prompt_and_is_refused(tmp_path: Path) -> None:
    [case] = [c for c in CASES if c.task == "causal-lm"]
    config = scored_job(tmp_path, case)
    for name in ("0", "1", "test"):
        path = tmp_path / f"{name}.jsonl"
        lines = [{"text": " ".join(row.values())} for row in map(json.loads, path.open())]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(FlowerSplitError, match="held-out records with a prompt"):
        finished(config)


def test_early_stopping_looks_at_a_score_and_refuses_one_that_is_not_there(tmp_path: Path) -> None:
    [case] = [c for c in CASES if c.task == "seq2seq"]
    config = scored_job(
        tmp_path,
        case,
        **{
            "num-server-rounds": 5,
            "train.local-steps": 1,
            "train.optimizer.learning-rate": 1e-9,  # nothing is learned
            "trunk.optimizer.learning-rate": 1e-9,
            "early-stopping.metric": "rouge-l",
            "early-stopping.goal": "max",
            "early-stopping.patience": 2,
        },
    )
    done = finished(config)
    assert max(int(str(line["server_round"])) for line in done.metrics("round")) == 2
    assert "rouge-l has not improved in 2 measurements" in (done.path / "report.md").read_text()
    with pytest.raises(ConfigError, match="'f1', and this run's evaluations have accuracy"):
        finished(
            config | {"early-stopping.metric": "f1", "run-dir": str(tmp_path / "refused")},
        )
