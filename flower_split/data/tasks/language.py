"""Language modelling: of the next token, of a text that follows from another, of masked tokens."""

import random
from collections.abc import Sequence
from typing import cast

from flower_split.data.documents import Completion, Document, Record, Text
from flower_split.data.examples import NO_LOSS, Example, make_examples, pack_texts
from flower_split.data.formats import parse_record
from flower_split.data.tally import Tally
from flower_split.data.tasks.task import DataTask, count_cut
from flower_split.errors import ConfigError, DataError

MASKED_SHARE = 0.15
"""Of the tokens, as in Devlin et al., "BERT", NAACL 2019: 8 of 10 become the mask, 1 another token."""


class CausalLm(DataTask):
    """``causal-lm``: the next token, of every format of :mod:`flower_split.data.formats`."""

    def document(self, record: Record, text_field: str, ignored: frozenset[str]) -> Document | None:
        """Return the document that a record is; see :class:`DataTask`."""
        return parse_record(record, text_field, ignored)

    def examples(self, documents: Sequence[Document], tally: Tally) -> list[Example]:
        """Return packed texts, and an example for every other document; see :class:`DataTask`."""
        return make_examples(documents, self.tokenizer, self.length, tally)


class Seq2Seq(CausalLm):
    """``seq2seq``: the encoder reads the prompt, and the decoder learns the completion."""

    def document(self, record: Record, text_field: str, ignored: frozenset[str]) -> Document | None:
        """Return a prompt with its completion; see :class:`DataTask`."""
        found = parse_record(record, text_field, ignored)
        if found is not None and not isinstance(found, Completion):
            raise DataError(
                f"{record.place}: seq2seq needs prompt and completion, both text (or instruction and "
                "output); this record is something else. Correct the record, or set model.task."
            )
        return found

    def examples(self, documents: Sequence[Document], tally: Tally) -> list[Example]:
        """Return an example for each pair; both sides are cut at their ends."""
        made = []
        for document in documents:
            assert isinstance(document, Completion)
            prompt = self._ids(document.prompt, tally, target=False)
            labels = self._ids(document.completion, tally, target=True)
            made.append(Example(prompt, labels, form="target"))
        return made

    def _ids(self, text: str, tally: Tally, *, target: bool) -> list[int]:
        """Return ids with the tokenizer's own special tokens, the end token last."""
        given = {"text_target": text} if target else {"text": text}
        whole = cast(list[int], self.tokenizer(**given, verbose=False)["input_ids"])
        end = self.tokenizer.eos_token_id
        if target and isinstance(end, int) and (not whole or whole[-1] != end):
            whole = [*whole, end]
        count_cut(tally, len(whole) - self.length)
        return whole[: self.length]


class MaskedLm(CausalLm):
    """``masked-lm``: masked tokens of running text, the same ones in every pass (static masking)."""

    def document(self, record: Record, text_field: str, ignored: frozenset[str]) -> Document | None:
        """Return running text; see :class:`DataTask`."""
        found = parse_record(record, text_field, ignored)
        if found is not None and not isinstance(found, Text):
            raise DataError(
                f"{record.place}: masked-lm needs running text in the field {text_field!r}; this record "
                "is something else. Name the field in data.text-field, or set model.task."
            )
        return found

    def examples(self, documents: Sequence[Document], tally: Tally) -> list[Example]:
        """Return packed texts with masked tokens; see :class:`DataTask`.

        Raises:
            ConfigError: The tokenizer has no mask token.
        """
        mask = self.tokenizer.mask_token_id
        if not isinstance(mask, int):
            raise ConfigError(
                f"masked-lm needs a tokenizer with a mask token; that of {self.config.model.name!r} has "
                "none. Use a model that was trained with one."
            )
        texts = [document for document in documents if isinstance(document, Text)]
        packed = pack_texts(texts, self.tokenizer, self.length, tally)
        return [self._masked(example.input_ids, mask) for example in packed]

    def _masked(self, ids: list[int], mask: int) -> Example:
        """Mask some tokens, chosen by the run's seed and the tokens themselves; at least one."""
        chance = random.Random(f"{self.config.seed}/{ids}")
        special = set(self.tokenizer.all_special_ids)
        places = [index for index, token in enumerate(ids) if token not in special]
        places = places or list(range(len(ids)))
        chosen = chance.sample(places, max(1, round(MASKED_SHARE * len(places))))
        shown, labels = list(ids), [NO_LOSS] * len(ids)
        for index in chosen:
            labels[index] = ids[index]
            kind = chance.random()
            if kind < 0.8:
                shown[index] = mask
            elif kind < 0.9:
                shown[index] = chance.randrange(len(self.tokenizer))
        return Example(shown, labels)
