"""Records of every task: what is read, cut and refused; scores worked out by hand."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flower_split.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from flower_split.data.batches import collate
from flower_split.data.documents import Record
from flower_split.data.examples import NO_LOSS, Example
from flower_split.data.tally import Tally
from flower_split.data.tasks.registry import DATA_TASKS
from flower_split.data.tasks.task import DataTask
from flower_split.errors import ConfigError, DataError
from flower_split.training.scores import scores_of, sums_of
from tests.support.task_runs import VOCABULARY, make_base


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreTrainedTokenizerBase]:
    path = tmp_path_factory.mktemp("bases")
    made: dict[str, Path] = {name: make_base(path / name, name) for name in ("bert", "t5")}
    return {name: AutoTokenizer.from_pretrained(folder) for name, folder in made.items()}


def task_of(
    bases: dict[str, PreTrainedTokenizerBase], name: str, labels: str = "", length: int = 8
) -> DataTask:
    config = RunConfig(
        model=ModelConfig(task=name, labels=labels),
        data=DataConfig(label_field="y"),
        train=TrainConfig(sequence_length=length),
    )
    return DATA_TASKS[name](config, bases["t5" if name == "seq2seq" else "bert"])


def examples_of(task: DataTask, *contents: dict[str, object]) -> tuple[list[Example], Tally]:
    tally = Tally(skip_bad_records=True)
    documents = [
        document
        for n, content in enumerate(contents)
        if (document := task.document(Record(f"row {n}", content), "text", frozenset()))
    ]
    return task.examples(documents, tally), tally


def ids(words: str) -> list[int]:
    return [VOCABULARY.index(word) for word in words.split()]


def test_sequence_classification_takes_names_and_indices_and_cuts_inside_the_special_tokens(
    bases: dict[str, PreTrainedTokenizerBase],
) -> None:
    task = task_of(bases, "sequence-classification", "sky, earth", length=5)
    rows = [{"text": "sun moon star sea", "y": y, "id": 3} for y in ("earth", 0, "1")]
    made, tally = examples_of(task, *rows)
    assert [example.labels for example in made] == [[1], [0], [1]]
    assert made[0].input_ids == ids("[CLS] sun moon star [SEP]")
    assert (tally.result().cut_examples, tally.result().cut_tokens) == (3, 3)
    batch = collate(made, 0)
    assert batch["labels"].tolist() == [1, 0, 1] and batch["input_ids"].shape == (3, 5)


def test_token_classification_labels_the_first_token_of_each_word(
    bases: dict[str, PreTrainedTokenizerBase],
) -> None:
    task = task_of(bases, "token-classification", "O, sky")
    [example], _ = examples_of(task, {"tokens": ["sun", "sea moon", "red"], "y": ["sky", "O", 1]})
    assert example.input_ids == ids("[CLS] sun sea moon red [SEP]")
    assert example.labels == [NO_LOSS, 1, 0, NO_LOSS, 1, NO_LOSS]


def test_answers_that_are_cut_off_are_left_out_and_counted(
    bases: dict[str, PreTrainedTokenizerBase],
) -> None:
    task = task_of(bases, "question-answering", length=8)
    rows = [
        {"question": "red", "context": f"{'sea ' * n}sun moon rock rock",
         "answers": {"text": ["sun moon"], "answer_start": [4 * n]}} for n in (1, 3)
    ]  # fmt: skip
    made, tally = examples_of(task, *rows)
    assert [example.labels for example in made] == [[4, 5]]  # [CLS] red [SEP] sea sun moon
    assert tally.result().bad_records == 1  # of the other, "moon" is the eighth token, which is cut
    batch = collate(made, 0)
    assert batch["labels"].tolist() == [[4, 5]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1, 1, 1]]


def test_a_target_longer_than_its_prompt_pads_the_prompt(
    bases: dict[str, PreTrainedTokenizerBase],
) -> None:
    made, _ = examples_of(task_of(bases, "seq2seq"), {"prompt": "sun", "completion": "moon star"})
    assert made == [Example(ids("sun"), ids("moon star </s>"), form="target")]
    batch = collate(made, 0)
    assert batch["input_ids"].tolist() == [[*ids("sun"), 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0]]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("sequence-classification", {"text": "sun"}, "y is missing"),
        ("sequence-classification", {"text": "sun", "y": "sea"}, "one of sky, earth.*'sea'"),
        ("sequence-classification", {"text": "sun", "y": 2}, "or its index from 0; it is 2"),
        ("sequence-classification", {"text": "sun", "y": True}, "it is True"),
        ("sequence-classification", {"text": "sun", "y": 0, "z": 1}, "'z' is not understood"),
        ("sequence-classification", {"text": " ", "y": 0}, "'text' must be text"),
        ("token-classification", {"tokens": ["sun"], "y": [0, 1]}, "each of the 1 words"),
        ("token-classification", {"tokens": "sun", "y": [0]}, "must be a list of words"),
        ("question-answering", {"question": "red", "context": "sun", "answers": {"text": []}}, "answers"),
        (
            "question-answering",
            {"question": "red", "context": "sun", "answers": {"text": ["x"], "answer_start": [0]}},
            "at 0 stands 's'",
        ),
        ("masked-lm", {"prompt": "sun", "completion": "sea"}, "needs running text"),
        ("seq2seq", {"text": "sun"}, "needs prompt and completion"),
    ],
)  # fmt: skip
def test_a_record_of_another_form_is_refused_by_name(
    bases: dict[str, PreTrainedTokenizerBase], name: str, content: dict[str, object], words: str
) -> None:
    task = task_of(bases, name, "sky, earth" if "classification" in name else "")
    with pytest.raises(DataError, match=f"row 0: .*{words}"):
        task.document(Record("row 0", content), "text", frozenset())


@pytest.mark.parametrize(
    ("task", "labels", "words"),
    [
        ("sequence-classification", "one", "two or more different classes"),
        ("sequence-classification", "a, a", "two or more different classes"),
        ("causal-lm", "a, b", "Leave them out"),
        ("vision", "", "model.task must be one of"),
    ],
)
def test_labels_that_do_not_fit_the_task_are_refused(task: str, labels: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ModelConfig(task=task, labels=labels)


def test_scores_of_classes_are_those_of_the_confusion_matrix() -> None:
    config = ModelConfig(task="token-classification", labels="O, a, b, c")
    said = torch.tensor([[0, 1, 1, 2, 2, 1]])
    true = torch.tensor([[0, 1, 2, 2, 0, NO_LOSS]])
    logits = torch.nn.functional.one_hot(said, 4).float()
    scores = scores_of(sums_of(logits, true, config), config)
    # a: 1 of 2 said, 1 of 1 true; b: 1 of 2, 1 of 2; c: nowhere; "O" does not count
    assert scores == pytest.approx({"accuracy": 3 / 5, "f1": (2 / 3 + 1 / 2) / 2})


def test_scores_of_answers_are_those_of_their_tokens() -> None:
    config = ModelConfig(task="question-answering")
    logits = torch.zeros(2, 2, 6)
    logits[0, 0, 1] = logits[0, 1, 2] = 1.0  # 1 to 2, as it is
    logits[1, 0, 2] = logits[1, 1, 4] = 1.0  # 2 to 4; it is 4 to 5
    scores = scores_of(sums_of(logits, torch.tensor([[1, 2], [4, 5]]), config), config)
    assert scores == pytest.approx({"exact_match": 0.5, "f1": (1 + 2 * 1 / (3 + 2)) / 2})
