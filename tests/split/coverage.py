"""Which families of transformers can be split: a table made by running each of them tiny.

``python -m tests.split.coverage [--markdown FILE] [family ...]`` walks transformers' mapping of
causal language models. For each family it builds a tiny configuration, runs the model by itself on
a batch with a left- and a right-padded row, splits it with ``split_model`` alone, and compares the
loss and every gradient (fp32, CPU, training mode, no dropout).

* identical: the loss and every gradient agree bit for bit.
* within tolerance: they agree to 1e-5, relative.
* refused: ``split_model`` raised SplitError, which says why.
* failed: anything else, above all another result.
* not run: the tiny model does not build or run by itself here; not counted as tried.
"""

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from flower_split.errors import SplitError
from flower_split.split import CutLayers, split_model
from flower_split.split.stack import find_stack
from tests.split.tiny import loss_and_gradients, padded_batch
from tests.split.tiny_configs import NOTES, tiny_config

OUTCOMES = ("identical", "within tolerance", "refused", "failed", "not run")
_TOLERANCE = 1e-5
_MAX_PARAMETERS = 10_000_000

Gradients = dict[str, Tensor | None]


@dataclass(frozen=True, slots=True)
class Row:
    """What became of one family."""

    family: str
    outcome: str
    remark: str  # the reason, or which layers were split


def families() -> list[str]:
    """Every family with a causal language model."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def check_family(family: str) -> Row:
    """Run one family whole and split, and compare."""
    try:
        model = _tiny_model(family)
        expected = _run(model)
        if not torch.isfinite(expected[0]):
            return Row(family, "not run", "the loss of the tiny model is not finite")
    except Exception as error:
        return Row(family, "not run", _reason(error))
    try:
        stack = find_stack(model)
        cuts = CutLayers(1, stack.num_layers - 1)
        client, trunk = split_model(model, cuts)
    except SplitError as error:
        return Row(family, "refused", str(error))
    except Exception as error:
        return Row(family, "failed", _reason(error))
    try:
        actual = _run(client, trunk)
    except Exception as error:
        return Row(family, "failed", _reason(error))
    where = f"layers {cuts.first} to {cuts.second - 1} of {stack.num_layers} in {stack.path}"
    if family in NOTES:
        where += f"; {NOTES[family]}"
    return Row(family, *_compare(expected, actual, where))


def _tiny_model(family: str) -> PreTrainedModel:
    config = tiny_config(family)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > _MAX_PARAMETERS:
        raise ValueError(f"the smallest configuration known here has {size} parameters")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).train()


def _run(model: PreTrainedModel, *others: torch.nn.Module) -> tuple[Tensor, Gradients]:
    torch.manual_seed(1)
    return loss_and_gradients(model, padded_batch(), *others)


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


def check_families(names: Iterable[str], *, progress: bool = False) -> list[Row]:
    """Run families one after another, single-threaded."""
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            rows.append(check_family(name))
            if progress:
                print(f"{name:28} {rows[-1].outcome:17} {rows[-1].remark}", flush=True)
    return rows


def summary(rows: Iterable[Row]) -> dict[str, int]:
    """How many families there are of each outcome, and how many were tried."""
    counts = Counter(row.outcome for row in rows)
    tried = sum(counts.values()) - counts["not run"]
    return {"tried": tried, **{outcome: counts[outcome] for outcome in OUTCOMES}}


def markdown(rows: list[Row]) -> str:
    """The table as Markdown, what needs attention first."""
    order = {outcome: rank for rank, outcome in enumerate(reversed(OUTCOMES))}
    lines = [
        "# Which causal language models can be split",
        "",
        f"Made by `python -m tests.split.coverage` with transformers {transformers.__version__} and "
        f"torch {torch.__version__}: loss and every gradient of the split model against the "
        "unsplit one, fp32 on CPU, padded batch.",
        "",
        "| " + " | ".join(summary(rows)) + " |",
        "|" + " --- |" * len(summary(rows)),
        "| " + " | ".join(str(count) for count in summary(rows).values()) + " |",
        "",
        "| family | outcome | remark |",
        "| --- | --- | --- |",
    ]
    for row in sorted(rows, key=lambda row: (order[row.outcome], row.family)):
        remark = row.remark.replace("|", "\\|")
        lines.append(f"| {row.family} | {row.outcome} | {remark} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Print the table; the exit status is 1 if a family failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", nargs="*", help="default: every family")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity(50)
    rows = check_families(arguments.family or families(), progress=True)
    print("  ".join(f"{name}: {count}" for name, count in summary(rows).items()))
    if arguments.markdown is not None:
        arguments.markdown.write_text(markdown(rows))
    return 1 if summary(rows)["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
