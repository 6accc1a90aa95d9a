"""Scores of generated text against the text that was wanted: ROUGE, BLEU, exact match.

They come from `rouge-score` and `sacrebleu` (extra ``text-scores``), as sums that add up over records and
clients: of BLEU the matches, which a corpus is scored by, and of the others each record's value.

ROUGE: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004 (F1 of 1-grams, 2-grams and the
longest common subsequence; words of Latin letters and digits, in lower case). BLEU: Papineni et al., ACL
2002, as Post, "A Call for Clarity in Reporting BLEU Scores", WMT 2018, computes it (0 to 100).
"""

import importlib.util
import math
from collections.abc import Collection, Mapping, Sequence

from flower_split.errors import ConfigError

COUNT = "count-text-"
"""Begins the names of the sums."""
ROUGE, BLEU, EXACT_MATCH = "rouge", "bleu", "exact-match"

_RECORDS = COUNT + "records"
_ROUGE_TYPES = {"rouge1": "rouge1", "rouge2": "rouge2", "rougeL": "rouge_l"}  # theirs -> ours
_ORDERS = (1, 2, 3, 4)
_LARGEST = 2.0**53  # beyond which a float counts no words
_LIBRARIES = {ROUGE: "rouge_score", BLEU: "sacrebleu"}


def check_libraries(names: Collection[str]) -> None:
    """Check that what the scores are computed by is installed.

    Raises:
        ConfigError: It is not; names the command that installs it.
    """
    missing = [
        library
        for name, library in _LIBRARIES.items()
        if name in names and importlib.util.find_spec(library) is None
    ]
    if missing:
        raise ConfigError(
            f"evaluation.text-scores needs {' and '.join(missing)}, which is not installed. Install it "
            "on the clients and where the ServerApp runs: pip install 'flower-split[text-scores]'."
        )


def sums_of_texts(
    found: Sequence[str], wanted: Sequence[str], names: Collection[str]
) -> dict[str, float]:
    """Return the sums of some records.

    Args:
        found: What the model made of each prompt.
        wanted: What should follow each.
        names: Which scores: a subset of rouge, bleu and exact-match.
    """
    sums = {_RECORDS: float(len(found))}
    if EXACT_MATCH in names:
        pairs = zip(found, wanted, strict=True)
        sums[COUNT + "exact"] = float(sum(a.strip() == b.strip() for a, b in pairs))
    if ROUGE in names:
        sums |= _rouge_sums(found, wanted)
    if BLEU in names:
        sums |= _bleu_sums(found, wanted)
    return sums


def text_scores_of(sums: Mapping[str, float]) -> dict[str, float]:
    """Return the scores that sums come to; empty where no text was generated."""
    records = sums.get(_RECORDS, 0.0)
    if not records:
        return {}
    scores = {}
    for name, part in (
        ("text_exact_match", "exact"),
        *((kind, kind) for kind in _ROUGE_TYPES.values()),
    ):
        if COUNT + part in sums:
            scores[name] = sums[COUNT + part] / records
    if COUNT + "words" in sums:
        scores[BLEU] = _bleu(sums)
    return scores


def _rouge_sums(found: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    from rouge_score.rouge_scorer import RougeScorer  # seconds to import

    scorer = RougeScorer(list(_ROUGE_TYPES))
    sums = dict.fromkeys((COUNT + kind for kind in _ROUGE_TYPES.values()), 0.0)
    for said, true in zip(found, wanted, strict=True):
        for kind, score in scorer.score(true, said).items():
            sums[COUNT + _ROUGE_TYPES[kind]] += float(score.fmeasure)
    return sums


def _bleu_sums(found: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    from sacrebleu import BLEU as Bleu

    scorer = Bleu(effective_order=True)  # silences its warning: single records are not scored here
    sums = dict.fromkeys([*_matches(), COUNT + "words", COUNT + "wanted-words"], 0.0)
    for said, true in zip(found, wanted, strict=True):
        score = scorer.sentence_score(said, [true])
        for order in _ORDERS:
            sums[f"{COUNT}matches-{order}"] += float(score.counts[order - 1])
            sums[f"{COUNT}ngrams-{order}"] += float(score.totals[order - 1])
        sums[COUNT + "words"] += float(score.sys_len)
        sums[COUNT + "wanted-words"] += float(score.ref_len)
    return sums


def _matches() -> list[str]:
    return [f"{COUNT}{part}-{order}" for part in ("matches", "ngrams") for order in _ORDERS]


def _bleu(sums: Mapping[str, float]) -> float:
    """Return the score; NaN where a client reported what cannot be counts."""
    from sacrebleu import BLEU as Bleu

    names = [*_matches(), COUNT + "words", COUNT + "wanted-words"]
    counts = [sums.get(name, math.nan) for name in names]
    if not all(0 <= count < _LARGEST for count in counts):
        return math.nan
    *grams, words, wanted = (round(count) for count in counts)
    score = Bleu.compute_bleu(
        grams[: len(_ORDERS)],
        grams[len(_ORDERS) :],
        words,
        wanted,
        smooth_method="exp",  # sacrebleu's own default for a corpus
    )
    return float(score.score)
