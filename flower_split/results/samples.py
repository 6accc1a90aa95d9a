"""Sample generations of a run: its base model and its trained model continue the same prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flower_split.data import load_tokenizer
from flower_split.results.client_adapter import OneClient
from flower_split.results.generation import (
    Sampling,
    TextGenerator,
    TrunkServer,
    open_generator,
)
from flower_split.runs.files import read_config
from flower_split.runs.samples import Sample, write_samples
from flower_split.runtime.devices import resolve_device
from flower_split.split import CutLayers, load_whole_model
from flower_split.split.loading.model_source import ModelSource


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedModel:
    """Whose model is tried; see :func:`flower_split.results.generation.open_generator`."""

    run: Path  # the run directory
    server: TrunkServer | None = None
    cuts: CutLayers | None = None
    client: OneClient | None = None


def make_samples(
    model: TrainedModel, prompts: Sequence[str], sampling: Sampling, *, chat: bool
) -> list[Sample]:
    """Continue every prompt with the base model and with a run's, and keep both with the run.

    Args:
        model: Whose model.
        prompts: Texts, or with ``chat`` first messages of a conversation each.
        sampling: How tokens are chosen, the same for both models.
        chat: The prompts are put into the tokenizer's chat template.

    Raises:
        FlowerSplitError: As for :func:`flower_split.results.generation.open_generator`, or a prompt
            has no token, or ``chat`` finds no template.
    """
    config = read_config(model.run)
    whole = load_whole_model(
        ModelSource.of(config.model), device=resolve_device(config.train.device, "train.device")
    )
    base = _said(TextGenerator(whole, load_tokenizer(config.model)), prompts, sampling, chat)
    with open_generator(model.run, model.server, model.cuts, model.client) as generator:
        trained = _said(generator, prompts, sampling, chat)
    samples = [
        Sample(prompt=prompt, base=before, trained=after)
        for prompt, before, after in zip(prompts, base, trained, strict=True)
    ]
    write_samples(model.run, samples)
    return samples


def _said(
    generator: TextGenerator, prompts: Sequence[str], sampling: Sampling, chat: bool
) -> list[str]:
    if not chat:
        return [generator.continue_text(prompt, sampling) for prompt in prompts]
    return [generator.answer([{"role": "user", "content": prompt}], sampling) for prompt in prompts]
