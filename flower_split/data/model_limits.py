"""What a model's configuration says about the data it can take; no weights are read.

Checked before anything starts: a token id beyond the embedding, or a position beyond the last learned
one, is an IndexError in the first round (on CUDA a device assert), and a rotary model runs past its
trained positions without a word.
"""

from collections.abc import Mapping

from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from flower_split.config import ModelConfig, RunConfig
from flower_split.config.model import NEXT_TOKEN
from flower_split.errors import ConfigError
from flower_split.split.loading.model_source import ModelSource

# Families that number positions from the padding token's id on, so that they have fewer of them.
_AFTER_PADDING = (
    "camembert",
    "data2vec-text",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)


def check_model_limits(config: RunConfig, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Check that the model fits its task and has room for the tokenizer and the sequences.

    Args:
        config: Its ``model`` and ``train.sequence_length`` are used.
        tokenizer: The model's own; None: it is not here, and not compared.

    Raises:
        ConfigError: It is an encoder, or something is too large for it; names key and limit.
    """
    model = _text_config(config.model)
    if model is None:
        return  # loading the model says what is wrong with its configuration
    name = config.model.name
    if config.model.task in NEXT_TOKEN and sees_later_tokens(model):
        raise ConfigError(
            f"model.name must be a causal language model; {name!r} ({model.model_type}) is an encoder: "
            "each token sees those after it, so it would see its own labels. Use a decoder, or another "
            'model.task, or, if its weights were trained as a decoder, set "is_decoder": true in its '
            "config.json."
        )
    length, most = config.train.sequence_length, max_positions(model)
    if most is not None and length > most:
        raise ConfigError(
            f"train.sequence-length must be at most the positions that {name!r} has, {most} "
            f"(max_position_embeddings in its config.json); it is {length}. Lower it, or set rope "
            "scaling in the model's config.json where the model has it."
        )
    rows = getattr(model, "vocab_size", None)
    if tokenizer is not None and isinstance(rows, int):
        largest = max(tokenizer.get_vocab().values(), default=-1)
        if largest >= rows:
            raise ConfigError(
                f"the tokenizer of {name!r} must fit its embedding; it has ids up to {largest}, and the "
                f"embedding {rows} rows (vocab_size in its config.json). Resize the model's embedding "
                "(model.resize_token_embeddings) and save it, or remove the added tokens."
            )


def _text_config(config: ModelConfig) -> PreTrainedConfig | None:
    source = ModelSource.of(config)
    try:
        whole = AutoConfig.from_pretrained(source.name_or_path, revision=source.revision)
    except (OSError, ValueError):
        return None
    made: PreTrainedConfig = whole.get_text_config(decoder=True)
    return made


def sees_later_tokens(config: PreTrainedConfig) -> bool:
    """Return whether a model of ``config``, loaded as a causal one, attends to later tokens.

    Encoders of BERT's kind are causal only if their configuration says ``is_decoder``; some families
    have a switch of their own.
    """
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        return True
    if getattr(config, "is_causal", True) is False:
        return True
    if config.model_type == "xlnet":
        return getattr(config, "attn_type", "bi") == "bi"
    if config.model_type in ("xlm", "flaubert"):
        return not getattr(config, "causal", False)
    encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    encoder = encoder or config.model_type == "bert-generation"
    if not encoder or config.is_encoder_decoder:
        return False
    return not getattr(config, "is_decoder", False)


def max_positions(config: PreTrainedConfig) -> int | None:
    """Return how many positions a model of ``config`` has; None where its attention has no limit.

    Rope scaling by a factor counts: the factor times the original positions, if that is more.
    """
    if getattr(config, "alibi", False) or config.model_type == "bloom":
        return None
    most = getattr(config, "max_position_embeddings", None)
    if most is None:
        most = getattr(config, "max_seq_len", None)
    if not isinstance(most, int) or most < 1:
        return None
    if config.model_type in _AFTER_PADDING:
        return most - int(config.pad_token_id or 0) - 1
    return max(most, *_scaled_positions(config, most))


def _scaled_positions(config: PreTrainedConfig, most: int) -> list[int]:
    """Return what rope scaling makes of the positions; a model may have it by kind of layer."""
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(scaling, Mapping):
        return [most]
    kinds = [scaling, *(kind for kind in scaling.values() if isinstance(kind, Mapping))]
    found = [most]
    for kind in kinds:
        factor, original = kind.get("factor"), kind.get("original_max_position_embeddings", most)
        if isinstance(factor, int | float) and isinstance(original, int):
            found.append(int(factor * original))
    return found
