"""The base model and where it is cut."""

import json
import re
from dataclasses import dataclass

from flower_split.config.validation import at_least, one_of
from flower_split.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16", "float64")
QUANTIZATIONS = ("bnb-8bit", "bnb-4bit", "dequantize")
CAUSAL_LM = "causal-lm"
SEQUENCE_CLASSIFICATION = "sequence-classification"
TOKEN_CLASSIFICATION = "token-classification"
QUESTION_ANSWERING = "question-answering"
MASKED_LM = "masked-lm"
SEQ2SEQ = "seq2seq"
IMAGE_CLASSIFICATION = "image-classification"
IMAGE_TEXT_TO_TEXT = "image-text-to-text"
TASKS = (
    CAUSAL_LM,
    SEQ2SEQ,
    SEQUENCE_CLASSIFICATION,
    TOKEN_CLASSIFICATION,
    QUESTION_ANSWERING,
    MASKED_LM,
    IMAGE_CLASSIFICATION,
    IMAGE_TEXT_TO_TEXT,
)
NEXT_TOKEN = (CAUSAL_LM, IMAGE_TEXT_TO_TEXT)  # whose loss is that of every next token
GENERATING = (CAUSAL_LM, SEQ2SEQ, IMAGE_TEXT_TO_TEXT)  # whose models continue a prompt
WITH_LABELS = (SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION, IMAGE_CLASSIFICATION)
OF_RECORDS = (SEQUENCE_CLASSIFICATION, QUESTION_ANSWERING, IMAGE_CLASSIFICATION)  # one label each
WITH_OWN_HEAD = (*WITH_LABELS, QUESTION_ANSWERING)  # which a base model lacks
_OWN_CUTS = re.compile(r"(\d+)\s*=\s*(\d+)\s*:\s*(\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The base model and where it is cut."""

    name: str = "quickstart"
    """The base model: quickstart (in the package), a local directory, or a hub id."""
    revision: str = ""
    """Hub revision; empty: the default branch."""
    task: str = CAUSAL_LM
    """What the model does: causal-lm, seq2seq (cut in the encoder), sequence-classification,
    token-classification, question-answering, masked-lm, image-classification or image-text-to-text
    (vision and language; cut in the language model)."""
    labels: str = ""
    """Of a classification: the classes, as "name, name"; a record's label is a name, or an index from 0."""
    first_cut: int = 2
    """The bottom is layers [0, first-cut)."""
    second_cut: int = 6
    """The trunk is layers [first-cut, second-cut); the top is the rest."""
    cuts_by_partition: str = ""
    """Cut layers of clients that keep more layers, as "partition=first:second, ..."."""
    dtype: str = "float32"
    """dtype of the base weights and the activations: float32, bfloat16, float16 or float64 (what
    trains is then float64 too, within a round)."""
    attn_implementation: str = ""
    """Attention implementation, by transformers' name; empty: the model's default."""
    quantization: str = ""
    """Quantization of the base weights: bnb-4bit, bnb-8bit, dequantize, or transformers'
    quantization_config as JSON; empty: as the checkpoint is."""

    def __post_init__(self) -> None:
        """Check the rules that need no model."""
        if not self.name:
            raise ConfigError("model.name must not be empty: a local directory or a hub id.")
        one_of("model.task", self.task, TASKS)
        self._check_labels()
        at_least("model.first-cut", self.first_cut, 0)
        if self.second_cut <= self.first_cut:
            raise ConfigError(
                "model.second-cut must be above model.first-cut, or the trunk has no layer; "
                f"they are {self.second_cut} and {self.first_cut}."
            )
        one_of("model.dtype", self.dtype, DTYPES)
        if self.quantization.lstrip().startswith("{"):
            try:
                json.loads(self.quantization)
            except ValueError as error:
                raise ConfigError(
                    f"model.quantization = {self.quantization!r} is no JSON object: {error}. "
                    "Write it as in a config.json's quantization_config, or use a name."
                ) from error
        elif self.quantization:
            one_of("model.quantization", self.quantization, (*QUANTIZATIONS, "a JSON object"))
        for partition, (first, second) in self.own_cuts.items():
            self.check_cuts(first, second, f"model.cuts-by-partition: partition {partition}")

    @property
    def reads_text(self) -> bool:
        """Whether the task's records are text, for which the model has a tokenizer."""
        return self.task != IMAGE_CLASSIFICATION

    @property
    def label_names(self) -> tuple[str, ...]:
        """The classes in ``labels``, in order."""
        return tuple(filter(None, (name.strip() for name in self.labels.split(","))))

    def _check_labels(self) -> None:
        names = self.label_names
        if self.task not in WITH_LABELS and names:
            raise ConfigError(
                f'model.labels are the classes of a classification, and model.task is "{self.task}". '
                "Leave them out."
            )
        if self.task in WITH_LABELS and (len(names) < 2 or len(set(names)) < len(names)):
            raise ConfigError(
                f'model.task = "{self.task}" needs two or more different classes in model.labels, as '
                f'"ham, spam"; they are {self.labels!r}.'
            )

    @property
    def own_cuts(self) -> dict[int, tuple[int, int]]:
        """Partition -> ``(first, second)`` cut, of ``cuts_by_partition``.

        Raises:
            ConfigError: It does not read so, or names a partition twice.
        """
        found: dict[int, tuple[int, int]] = {}
        for item in filter(None, (part.strip() for part in self.cuts_by_partition.split(","))):
            match = _OWN_CUTS.fullmatch(item)
            if match is None:
                raise ConfigError(
                    'model.cuts-by-partition must read "partition=first:second, …", such as '
                    f'"0=3:5, 2=4:6"; {item!r} in it does not.'
                )
            partition, first, second = (int(number) for number in match.groups())
            if partition in found:
                raise ConfigError(
                    f"model.cuts-by-partition names partition {partition} twice. Name it once."
                )
            found[partition] = (first, second)
        return found

    def check_cuts(self, first: int, second: int, who: str) -> None:
        """Refuse cut layers of one client that do not lie within the trunk's.

        Args:
            first: The client's first cut.
            second: Its second cut.
            who: Whose they are, as the subject of the error's sentence.

        Raises:
            ConfigError: They do not, or leave the trunk no layer.
        """
        if not self.first_cut <= first < second <= self.second_cut:
            raise ConfigError(
                f"{who} has the cut layers {first}:{second}; they must lie within the trunk's, "
                f"model.first-cut = {self.first_cut} and model.second-cut = {self.second_cut}, with "
                "at least one layer between them: a client may keep more layers than the run says, "
                "not fewer. Change its cut layers, or give the trunk a wider span."
            )
