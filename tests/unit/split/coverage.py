"""Which families of transformers can be split: a table made by running each of them tiny.

``python -m tests.unit.split.coverage [--task TASK] [--markdown FILE] [family ...]`` walks transformers'
mappings of models to tasks: causal language models, heads on encoders and decoders, masked language
models, image classifiers, encoder-decoder and vision-language models. For each family it builds a
tiny configuration, runs the model by itself on a batch with a left- and a right-padded row, splits
it with ``split_model`` alone, and compares the loss and every gradient (fp32, CPU, training mode, no
dropout).

* identical: the loss and every gradient agree bit for bit.
* within tolerance: they agree to 1e-5, relative.
* refused: ``split_model``, or the client's first call, raised SplitError, which says why.
* failed: anything else, above all another result.
* not run: the tiny model does not build or run by itself here; not counted as tried.
"""

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from flower_split.errors import SplitError
from flower_split.split import CutLayers, split_model
from flower_split.split.structure.stack import find_stack
from tests.support import task_batches
from tests.support.tiny_configs import NOTES, tiny_config
from tests.support.tiny_models import loss_and_gradients

OUTCOMES = ("identical", "within tolerance", "refused", "failed", "not run")
_TOLERANCE = 1e-5
_MAX_PARAMETERS = 10_000_000

Gradients = dict[str, Tensor | None]


@dataclass(frozen=True, slots=True)
class Task:
    """One of transformers' mappings of families to models."""

    title: str
    auto_class: str
    mapping: str
    # What to run, the most demanding first; the first that the unsplit model runs counts.
    batches: Callable[[PreTrainedModel], Iterator[tuple[str, dict[str, Tensor]]]]


TASKS = {
    "causal-lm": Task(
        "Causal language models",
        "AutoModelForCausalLM",
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
        task_batches.causal_lm,
    ),
    "sequence-classification": Task(
        "Sequence classification",
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        task_batches.sequence_classification,
    ),
    "token-classification": Task(
        "Token classification",
        "AutoModelForTokenClassification",
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
        task_batches.token_classification,
    ),
    "question-answering": Task(
        "Question answering",
        "AutoModelForQuestionAnswering",
        "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
        task_batches.question_answering,
    ),
    "masked-lm": Task(
        "Masked language models",
        "AutoModelForMaskedLM",
        "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
        task_batches.masked_lm,
    ),
    "image-classification": Task(
        "Image classification",
        "AutoModelForImageClassification",
        "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
        task_batches.image_classification,
    ),
    "seq2seq": Task(
        "Encoder-decoder models (cut in the encoder)",
        "AutoModelForSeq2SeqLM",
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
        task_batches.seq2seq,
    ),
    "image-text-to-text": Task(
        "Vision-language models",
        "AutoModelForImageTextToText",
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
        task_batches.image_text_to_text,
    ),
}


@dataclass(frozen=True, slots=True)
class Row:
    """What became of one family."""

    family: str
    outcome: str
    remark: str  # the reason, or which layers were split


def families(task: str = "causal-lm") -> list[str]:
    """Every family with a model for the task."""
    return list(getattr(modeling_auto, TASKS[task].mapping))


def check_family(family: str, task: str = "causal-lm", cuts: CutLayers | None = None) -> Row:
    """Run one family whole and split, and compare.

    Args:
        family: transformers' ``model_type``.
        task: One of ``TASKS``.
        cuts: The cut layers; None: all but the first and the last layer are the trunk.
    """
    try:
        model = _tiny_model(family, TASKS[task])
        kind, batch, expected = _run_whole(model, TASKS[task])
        if not torch.isfinite(expected[0]):
            return Row(family, "not run", "the loss of the tiny model is not finite")
    except Exception as error:
        return Row(family, "not run", _reason(error))
    try:
        stack = find_stack(model)
        cuts = cuts or CutLayers(1, max(2, stack.num_layers - 1))
        client, trunk = split_model(model, cuts)
        actual = _run(batch, client, trunk)
    except SplitError as error:
        return Row(family, "refused", str(error))
    except Exception as error:
        return Row(family, "failed", _reason(error))
    where = f"layers {cuts.first} to {cuts.second - 1} of {stack.num_layers} in {stack.path}"
    remarks = [where, *filter(None, [kind, NOTES.get(family)])]
    return Row(family, *_compare(expected, actual, "; ".join(remarks)))


def _tiny_model(family: str, task: Task) -> PreTrainedModel:
    config = tiny_config(family)
    auto_class = getattr(transformers, task.auto_class)
    with torch.device("meta"):
        size = sum(p.numel() for p in auto_class.from_config(config).parameters())
    if size > _MAX_PARAMETERS:
        raise ValueError(f"the smallest configuration known here has {size} parameters")
    torch.manual_seed(0)
    model: PreTrainedModel = auto_class.from_config(config).train()
    return model


def _run_whole(
    model: PreTrainedModel, task: Task
) -> tuple[str, dict[str, Tensor], tuple[Tensor, Gradients]]:
    """The first of the task's batches that the model runs: its kind, itself, loss and gradients."""
    problem: Exception | None = None
    for kind, batch in task.batches(model):
        try:
            return kind, batch, _run(batch, model)
        except Exception as error:
            problem = problem or error
    assert problem is not None
    raise problem


def _run(
    batch: dict[str, Tensor], model: PreTrainedModel, *others: torch.nn.Module
) -> tuple[Tensor, Gradients]:
    torch.manual_seed(1)
    batch = {name: tensor.clone() for name, tensor in batch.items()}
    return loss_and_gradients(model, batch, *others)


def _compare(
    expected: tuple[Tensor, Gradients], actual: tuple[Tensor, Gradients], where: str
) -> tuple[str, str]:
    """The outcome, and a remark that names the worst gradient where there is one."""
    # A family may have weights that its loss does not reach.
    pairs = {
        name: (value, actual[1].get(name))
        for name, value in expected[1].items()
        if value is not None
    }
    pairs["loss"] = (expected[0], actual[0])
    unexpected = [n for n, v in actual[1].items() if v is not None and n not in pairs]
    lost = [name for name, (_, other) in pairs.items() if other is None]
    if unexpected or lost:
        return "failed", f"gradients on one side only: {', '.join((unexpected + lost)[:3])}"
    differences = {
        name: float((value - other).norm() / value.norm().clamp_min(1e-12))
        for name, (value, other) in pairs.items()
        if other is not None and not torch.equal(value, other)
    }
    if not differences:
        return "identical", where
    worst = max(differences, key=lambda name: differences[name])
    remark = f"{where}; {worst} differs by {differences[worst]:.1e}, relative"
    return ("within tolerance" if differences[worst] < _TOLERANCE else "failed"), remark


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


def check_families(
    names: Iterable[str], task: str = "causal-lm", *, progress: bool = False
) -> list[Row]:
    """Run families one after another, single-threaded."""
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            rows.append(check_family(name, task))
            if progress:
                print(f"{name:28} {rows[-1].outcome:17} {rows[-1].remark}", flush=True)
    return rows


def summary(rows: Iterable[Row]) -> dict[str, int]:
    """How many families there are of each outcome, and how many were tried."""
    counts = Counter(row.outcome for row in rows)
    tried = sum(counts.values()) - counts["not run"]
    return {"tried": tried, **{outcome: counts[outcome] for outcome in OUTCOMES}}


def markdown(tables: dict[str, list[Row]]) -> str:
    """All tables as Markdown: counts per task, then each task, what needs attention first."""
    columns = list(summary([]))
    lines = [
        "# Which models can be split",
        "",
        f"Made by `python -m tests.unit.split.coverage` with transformers {transformers.__version__} and "
        f"torch {torch.__version__}: loss and every gradient of the split model against the "
        "unsplit one, fp32 on CPU, padded batch.",
        "",
        f"| task | {' | '.join(columns)} |",
        "|" + " --- |" * (len(columns) + 1),
    ]
    for task, rows in tables.items():
        counts = " | ".join(str(count) for count in summary(rows).values())
        lines.append(f"| {TASKS[task].title} | {counts} |")
    order = {outcome: rank for rank, outcome in enumerate(reversed(OUTCOMES))}
    for task, rows in tables.items():
        lines += ["", f"## {TASKS[task].title}", ""]
        lines += ["| family | outcome | remark |", "| --- | --- | --- |"]
        for row in sorted(rows, key=lambda row: (order[row.outcome], row.family)):
            remark = row.remark.replace("|", "\\|")
            lines.append(f"| {row.family} | {row.outcome} | {remark} |")
    return "\n".join(lines) + "\n"


def read_markdown(text: str) -> dict[str, list[Row]]:
    """The tables that :func:`markdown` wrote."""
    tasks = {task.title: name for name, task in TASKS.items()}
    tables: dict[str, list[Row]] = {}
    for line in text.splitlines():
        if line.startswith("## "):
            rows = tables.setdefault(tasks[line[3:]], [])
        elif tables and line.startswith("| ") and line.split(" | ")[1] in OUTCOMES:
            family, outcome, remark = line[2:-2].split(" | ", 2)
            rows.append(Row(family, outcome, remark.replace("\\|", "|")))
    return tables


def _updated(tables: dict[str, list[Row]], path: Path) -> dict[str, list[Row]]:
    """``tables``, and the rows at ``path`` of families that are not in them."""
    before = read_markdown(path.read_text()) if path.exists() else {}
    merged = {}
    for task in TASKS:
        rows = tables.get(task, [])
        new = {row.family for row in rows}
        merged[task] = [*rows, *(row for row in before.get(task, []) if row.family not in new)]
    return {task: rows for task, rows in merged.items() if rows}


def main() -> int:
    """Print the tables; the exit status is 1 if a family failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", nargs="*", help="default: every family of the task")
    parser.add_argument("--task", choices=list(TASKS), action="append", help="default: every task")
    parser.add_argument(
        "--markdown",
        type=Path,
        help="also write the tables here; rows of other families stay",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity(50)
    tables: dict[str, list[Row]] = {}
    for task in arguments.task or TASKS:
        print(f"\n{TASKS[task].title}", flush=True)
        known = families(task)
        names = [name for name in arguments.family if name in known] or known
        tables[task] = check_families(names, task, progress=True)
    print()
    for task, rows in tables.items():
        counts = "  ".join(f"{name}: {count}" for name, count in summary(rows).items())
        print(f"{task:24} {counts}")
    if arguments.markdown is not None:
        arguments.markdown.write_text(markdown(_updated(tables, arguments.markdown)))
    return 1 if any(summary(rows)["failed"] for rows in tables.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
