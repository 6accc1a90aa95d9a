"""Every task from its records to its scores: a run's held-out numbers are the unsplit model's own."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, PreTrainedModel

from flower_split.config import Scalar, parse_run_config
from flower_split.data import load_client_data, load_tokenizer
from flower_split.errors import FlowerSplitError
from flower_split.lora import attach_lora
from flower_split.parties.parts import client_parts, model_cuts
from flower_split.results.export import export_adapter
from flower_split.runs.directory import RunDirectory
from flower_split.server.app import run
from flower_split.split import CutLayers, load_client_model, load_whole_model
from flower_split.split.loading.model_source import ModelSource
from flower_split.wire.sending import Outgoing
from tests.support.local_grid import LocalGrid, TrunkHere
from tests.support.task_runs import RUNS, SPECIAL, TaskRun, make_base, records, write_records
from tests.support.tiny_app import tiny_config

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries, on models this small
AUTO = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "masked-lm": "AutoModelForMaskedLM",
    "image-classification": "AutoModelForImageClassification",
    "image-text-to-text": "AutoModelForImageTextToText",
}
CLIENTS = 2


@pytest.fixture(autouse=True)
def trunk_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flower_split.server.trunk_connection.TrunkProcess", TrunkHere)


def job(tmp_path: Path, case: TaskRun, **changes: Scalar) -> dict[str, Scalar]:
    model = make_base(tmp_path / "base", case.family)
    for slot in range(CLIENTS):
        write_records(tmp_path / f"{slot}.jsonl", records(case.task, 1 + slot, 12))
    write_records(tmp_path / "test.jsonl", records(case.task, 9, 10))
    config = tiny_config(model, str(tmp_path / "{partition_id}.jsonl"), num_clients=CLIENTS)
    return config | {
        "model.task": case.task,
        "model.labels": ", ".join(case.labels),
        "data.eval-path": str(tmp_path / "test.jsonl"),
        "trunk.step-every": "server-round",
        "train.local-steps": 24,
        "train.optimizer.name": "adamw",
        "train.optimizer.learning-rate": 0.01,
        "trunk.optimizer.name": "adamw",
        "trunk.optimizer.learning-rate": 0.01,
        "train.sequence-length": 24,
        "train.batch-size": 4,
        "run-dir": str(tmp_path / "run"),
        **changes,
    }


def finished(config: dict[str, Scalar]) -> RunDirectory:
    run(LocalGrid(CLIENTS, config), parse_run_config(config))
    return RunDirectory.open(Path(str(config["run-dir"])))


def unsplit(done: RunDirectory, case: TaskRun, tmp_path: Path) -> PreTrainedModel:
    """The plain model of transformers under the adapter that the run exports."""
    more = {"num_labels": len(case.labels)} if case.labels else {}
    plain = getattr(transformers, AUTO[case.task]).from_pretrained(tmp_path / "base", **more)
    plain.config.pad_token_id = 0
    out = export_adapter(done.path, tmp_path / "adapter")
    return PeftModel.from_pretrained(plain, str(out)).eval()


def own_numbers(
    model: PreTrainedModel, case: TaskRun, rows: Sequence[dict[str, object]], tmp_path: Path
) -> dict[str, float]:
    """Loss and scores of records one by one, by the model's own loss, worked out here."""
    auto = AutoImageProcessor if case.task == "image-classification" else AutoTokenizer
    tokenizer = auto.from_pretrained(tmp_path / "base")
    losses, weights, pairs, exact, overlap = [], [], [], [], []
    for row in rows:
        if "image" in row:
            row = {**row, "image": Image.open(tmp_path / str(row["image"]))}
        batch, labels = encoded(tokenizer, case, row)
        with torch.no_grad():
            output = model(**batch, **labels)
        count = 1 if "labels" not in labels else int((labels["labels"] != -100).sum())
        losses.append(float(output.loss) * count)
        weights.append(count)
        if case.task == "question-answering":
            said = set(
                range(int(output.start_logits.argmax()), int(output.end_logits.argmax()) + 1)
            )
            true = set(range(int(labels["start_positions"]), int(labels["end_positions"]) + 1))
            ends = [output.start_logits.argmax(), output.end_logits.argmax()]
            exact.append(ends == [*labels.values()])
            overlap.append(2 * len(said & true) / (len(said) + len(true)))
            continue
        found, wanted = output.logits.argmax(-1).flatten(), labels["labels"].flatten()
        counted = [(int(f), int(w)) for f, w in zip(found, wanted, strict=True) if w != -100]
        pairs += counted
        exact.append(all(f == w for f, w in counted))
    numbers = {"eval_loss": sum(losses) / sum(weights)}
    if case.task == "question-answering":
        return numbers | {"exact_match": mean(exact), "f1": mean(overlap)}
    numbers["accuracy"] = mean([f == w for f, w in pairs])
    if case.task == "seq2seq":
        numbers["exact_match"] = mean(exact)
    each = []
    for index, name in enumerate(case.labels):
        both = sum(f == w == index for f, w in pairs)
        either = sum(f == index for f, _ in pairs) + sum(w == index for _, w in pairs)
        if name != "O" and either:
            each.append(2 * both / either)
    return numbers | ({"f1": mean(each)} if each else {})


def encoded(
    tokenizer: transformers.PreTrainedTokenizerBase, case: TaskRun, row: dict[str, object]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """One record as transformers' own tokenizer, or image processor, and models take it."""
    if case.task == "image-classification":
        label = torch.tensor([case.labels.index(str(row["label"]))])
        return dict(tokenizer(row["image"], return_tensors="pt")), {"labels": label}
    if case.task == "sequence-classification":
        label = row["label"]
        index = label if isinstance(label, int) else case.labels.index(str(label))
        return dict(tokenizer(row["text"], return_tensors="pt")), {"labels": torch.tensor([index])}
    if case.task == "token-classification":
        batch = tokenizer(row["tokens"], is_split_into_words=True, return_tensors="pt")
        classes = [case.labels.index(name) for name in row["label"]]  # type: ignore[attr-defined]
        return dict(batch), {"labels": torch.tensor([[-100, *classes, -100]])}
    if case.task == "question-answering":
        batch = tokenizer(row["question"], row["context"], return_tensors="pt")
        # [CLS] question [SEP], two words, then the answer of two
        return dict(batch), {
            "start_positions": torch.tensor([5]),
            "end_positions": torch.tensor([6]),
        }
    batch = tokenizer(row["prompt"], return_tensors="pt")
    target = tokenizer(row["completion"])["input_ids"]
    return dict(batch), {"labels": torch.tensor([[*target, 5]])}


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize(
    "case",
    [r for r in RUNS if r.task not in ("causal-lm", "masked-lm", "image-text-to-text")],
    ids=str,
)
def test_held_out_numbers_of_a_run_are_the_unsplit_models_own(
    tmp_path: Path, case: TaskRun
) -> None:
    done = finished(job(tmp_path, case))
    first, last = (
        [e for e in done.metrics("evaluation") if e["server_round"] == n] for n in (0, 1)
    )
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    expected = own_numbers(unsplit(done, case, tmp_path), case, rows, tmp_path)
    assert expected.keys() >= {"eval_loss"} and len(expected) >= 3
    assert len(last) == CLIENTS  # both have the test set
    for line in [*last, done.metrics("round")[-1]]:
        for name, value in expected.items():
            assert line[name] == pytest.approx(value, rel=2e-5), name
    assert last[0]["loss_sum"] < first[0]["loss_sum"]  # and it has learned
    overall = done.summary()["overall"]
    scores = overall["federated_scores"]  # type: ignore[index, call-overload]
    assert scores == pytest.approx({k: v for k, v in expected.items() if k != "eval_loss"})
    text = (done.path / "report.md").read_text()
    assert all(f"{name}: base, federated" in text for name in scores)


def test_held_out_loss_of_pictures_with_prompts_is_the_unsplit_models_own(tmp_path: Path) -> None:
    [case] = [r for r in RUNS if r.task == "image-text-to-text"]
    done = finished(job(tmp_path, case))
    lines = done.metrics("evaluation")
    model, processor = (
        unsplit(done, case, tmp_path),
        AutoProcessor.from_pretrained(tmp_path / "base"),
    )
    losses, count = 0.0, 0
    for text in (tmp_path / "test.jsonl").read_text().splitlines():
        row = json.loads(text)
        image = Image.open(tmp_path / row["image"])
        batch = processor(images=image, text="<image>\n" + row["prompt"], return_tensors="pt")
        answer = [*processor.tokenizer(row["completion"])["input_ids"], 5]
        ids = torch.cat([batch.pop("input_ids"), torch.tensor([answer])], dim=1)
        labels = torch.full_like(ids, -100)
        labels[:, -len(answer) :] = ids[:, -len(answer) :]
        with torch.no_grad():
            output = model(
                input_ids=ids, pixel_values=batch["pixel_values"], labels=labels, use_cache=False
            )
        losses, count = losses + float(output.loss) * len(answer), count + len(answer)
    for line in lines[-CLIENTS:]:
        assert line["num_tokens"] == count == 35  # five of two words, five of three, and their ends
        assert line["eval_loss"] == pytest.approx(losses / count, rel=2e-5)
    assert lines[-1]["eval_loss"] < 0.25 * lines[0]["eval_loss"]  # type: ignore[operator]
    with torch.no_grad():  # and it looks at the picture
        blind = model(input_ids=ids, pixel_values=torch.zeros(1, 3, 16, 16), labels=labels)
    assert abs(float(blind.loss) - float(output.loss)) > 0.01


def test_masked_tokens_of_a_run_have_the_unsplit_models_loss(tmp_path: Path) -> None:
    [case] = [r for r in RUNS if r.task == "masked-lm"]
    config = job(tmp_path, case)
    done = finished(config)
    line = [e for e in done.metrics("evaluation") if e["server_round"] == 1][0]
    model = unsplit(done, case, tmp_path)
    parsed = parse_run_config(config)
    data = load_client_data(parsed, load_tokenizer(parsed.model), 0, CLIENTS)
    again = load_client_data(parsed, load_tokenizer(parsed.model), 0, CLIENTS)
    assert data == again  # the same tokens are masked whenever the client starts
    losses, right, count, masks = 0.0, 0, 0, 0
    for example in data.evaluate:
        labels = torch.tensor([example.labels])
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            output = model(input_ids=ids, labels=labels)
        here = int((labels != -100).sum())
        assert here == max(
            1, round(0.15 * sum(i >= len(SPECIAL) or i == 4 for i in ids[0].tolist()))
        )
        losses, count = losses + float(output.loss) * here, count + here
        right += int((output.logits.argmax(-1) == labels).sum())
        masks += int((ids == 4).sum())
        hidden = labels == -100
        assert not bool((ids[hidden] == 4).any())  # nothing else is masked
    assert 0.5 * count < masks <= count
    assert line["eval_loss"] == pytest.approx(losses / count, rel=2e-5)
    assert line["accuracy"] == pytest.approx(right / count)


@pytest.mark.parametrize(
    ("task", "family", "words"),
    [
        ("causal-lm", "bert", "is an encoder"),
        ("masked-lm", "llama", "AutoModelForMaskedLM does not load"),
        ("seq2seq", "bert", "AutoModelForSeq2SeqLM does not load"),
    ],
)
def test_a_model_that_is_none_of_the_task_is_refused(
    tmp_path: Path, task: str, family: str, words: str
) -> None:
    config = job(tmp_path, TaskRun(task, family))
    with pytest.raises(FlowerSplitError, match=words):
        finished(config)


def test_a_checkpoint_without_what_the_task_needs_and_does_not_train_is_refused(
    tmp_path: Path,
) -> None:
    [case] = [r for r in RUNS if r.task == "masked-lm"]
    config = job(tmp_path, case)
    base = tmp_path / "base"
    transformers.AutoModel.from_pretrained(base).save_pretrained(base)  # without its head
    with pytest.raises(FlowerSplitError, match="lacks .* tensors of this part, such as cls"):
        finished(config)


def test_new_head_is_the_same_on_every_client_and_trains_whole(tmp_path: Path) -> None:
    case = RUNS[0]
    config = parse_run_config(job(tmp_path, case))
    source, cuts = ModelSource.of(config.model), model_cuts(config)
    heads = []
    for first in (1, 2):  # clients of different cuts, with other random states
        torch.manual_seed(first)
        client = load_client_model(source, CutLayers(first, 3), torch.nn.Identity())
        heads.append(
            {n: p for n, p in client.named_parameters() if "classifier" in n or "pooler" in n}
        )
    whole = dict(load_whole_model(source).named_parameters())
    assert heads[0].keys() == heads[1].keys() and len(heads[0]) == 4
    for name, value in heads[0].items():
        assert torch.equal(value, heads[1][name]) and torch.equal(value, whole[name]), name
    weight = heads[0]["classifier.weight"]
    assert weight.shape == (2, 32) and 0.01 < float(weight.std()) < 0.03  # initializer_range
    attach_lora(client, cuts, client_parts(config), seed=0, incomplete=("trunk",))
    trained = {name for name, p in client.named_parameters() if p.requires_grad}
    assert {n for n in trained if "lora" not in n} == heads[0].keys()


def test_pixels_of_a_run_stay_on_the_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [case] = [r for r in RUNS if r.task == "image-classification"]
    sent: list[tuple[str, tuple[int, ...]]] = []

    class Watched(Outgoing):
        def __init__(self, header: object, tensors: Mapping[str, torch.Tensor], *more: object):
            sent.extend((name, tuple(tensor.shape)) for name, tensor in tensors.items())
            super().__init__(header, tensors, *more)  # type: ignore[arg-type]

    monkeypatch.setattr("flower_split.client.calls.Outgoing", Watched)
    finished(job(tmp_path, case, **{"train.local-steps": 2}))
    # Sixteen patches and the class token, each of 32 numbers; nothing else leaves.
    assert {(name, shape[1:]) for name, shape in sent} == {
        ("hidden_states", (17, 32)),
        ("trunk_output_grad", (17, 32)),
    }
