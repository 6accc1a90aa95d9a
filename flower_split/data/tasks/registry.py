"""``model.task`` -> what it does with records."""

from collections.abc import Mapping
from types import MappingProxyType

from flower_split.config import model as tasks
from flower_split.data.tasks.answers import QuestionAnswering
from flower_split.data.tasks.classification import SequenceClassification, TokenClassification
from flower_split.data.tasks.image_text import ImageTextToText
from flower_split.data.tasks.images import ImageClassification
from flower_split.data.tasks.language import CausalLm, MaskedLm, Seq2Seq
from flower_split.data.tasks.task import DataTask

DATA_TASKS: Mapping[str, type[DataTask]] = MappingProxyType(
    {
        tasks.CAUSAL_LM: CausalLm,
        tasks.SEQ2SEQ: Seq2Seq,
        tasks.MASKED_LM: MaskedLm,
        tasks.SEQUENCE_CLASSIFICATION: SequenceClassification,
        tasks.TOKEN_CLASSIFICATION: TokenClassification,
        tasks.QUESTION_ANSWERING: QuestionAnswering,
        tasks.IMAGE_CLASSIFICATION: ImageClassification,
        tasks.IMAGE_TEXT_TO_TEXT: ImageTextToText,
    }
)
