"""Text from a finished run: its bottom and top, around its trunk, here or on a trunk server.

In process the trunk is loaded beside the client's part. On a server the client's part alone is
loaded; each new token then sends one position's hidden states, and the trunk keeps its own keys and
values.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
)

from flower_split.client.model_cache import NoTrunk
from flower_split.client.remote_trunk import RemoteTrunk
from flower_split.config import RunConfig
from flower_split.config.model import CAUSAL_LM
from flower_split.config.validation import ENVIRONMENT
from flower_split.data import load_tokenizer
from flower_split.errors import ConfigError, FlowerSplitError, RunDirectoryError
from flower_split.lora import attach_lora, load_adapter_state
from flower_split.lora.base_change import set_base_change
from flower_split.lora.model_parts import stack_of
from flower_split.parties.fingerprint import fingerprint
from flower_split.parties.parts import held_parts, model_cuts, trunk_parts
from flower_split.protocol.values import RoundPlan
from flower_split.results.client_adapter import OneClient, read_client_adapter
from flower_split.results.client_view import clients_own, with_cuts
from flower_split.results.export import read_base_change
from flower_split.runs.directory import RunDirectory
from flower_split.runtime.devices import resolve_device
from flower_split.server.coordinator import TrunkCoordinator
from flower_split.split import CutLayers, load_client_model, load_trunk_model, set_trunk
from flower_split.split.loading.model_source import ModelSource
from flower_split.wire.client_certificate import NO_CERTIFICATE, ClientCertificate
from flower_split.wire.possession import ClientKey, new_token

Message = dict[str, str]  # "role" and "content"

_SLOT = 0
_LEASE_SECONDS = 3600.0  # of a session on a trunk server, thinking between prompts included


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How tokens are chosen."""

    max_new_tokens: int = 64
    temperature: float = 0.0  # 0: the likeliest token
    top_p: float = 1.0  # share of the probability that is sampled from
    num_beams: int = 1
    seed: int = 0  # of the sampling

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.max_new_tokens < 1:
            raise ConfigError(f"--max-new-tokens must be at least 1; it is {self.max_new_tokens}.")
        if self.num_beams < 1:
            raise ConfigError(f"--num-beams must be at least 1; it is {self.num_beams}.")
        if self.temperature < 0:
            raise ConfigError(f"--temperature must be at least 0; it is {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p must be in (0, 1]; it is {self.top_p}.")


@dataclass(frozen=True, slots=True)
class TrunkServer:
    """A trunk server that serves the run's trunk."""

    address: str  # host:port
    token: str  # the coordinator's
    root_certificates: str = ""  # PEM file; empty: plain text, on loopback
    certificate: ClientCertificate = NO_CERTIFICATE  # shown as the coordinator, and as a client
    proxy: str = ENVIRONMENT  # as trunk.proxy


class TextGenerator:
    """Continues prompts. Made by :func:`open_generator`.

    Args:
        model: A client model with its trunk in place.
        tokenizer: The model's.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer

    def continue_text(self, prompt: str, sampling: Sampling, *, show: bool = False) -> str:
        """Return what follows ``prompt``.

        Args:
            prompt: Raw text.
            sampling: How tokens are chosen.
            show: Write the text to standard output as it comes; with beams, at the end.

        Raises:
            ConfigError: The prompt has no token.
            TrunkError: The trunk refused or did not answer in time.
        """
        ids: list[int] = self.tokenizer(prompt)["input_ids"]
        return self._generate(ids, sampling, show)

    def answer(self, messages: Sequence[Message], sampling: Sampling, *, show: bool = False) -> str:
        """Return the next message of a conversation, by the tokenizer's chat template.

        Raises:
            ConfigError: The tokenizer has no chat template.
            TrunkError: As for :meth:`continue_text`.
        """
        if self.tokenizer.chat_template is None:
            raise ConfigError(
                "--chat needs a tokenizer with a chat template, and this model's has none. Leave "
                "--chat out: the prompt is then continued as it is."
            )
        text = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._generate(ids, sampling, show)

    def _settings(self, sampling: Sampling) -> GenerationConfig:
        """Return the model's own settings of generation, with ``sampling``'s in place."""
        settings = copy.deepcopy(self.model.generation_config)
        settings.max_new_tokens = sampling.max_new_tokens
        settings.num_beams = sampling.num_beams
        settings.do_sample = sampling.temperature > 0
        settings.temperature = sampling.temperature or None
        settings.top_p = sampling.top_p if settings.do_sample else None
        settings.pad_token_id = self.tokenizer.pad_token_id
        return settings

    def _generate(self, ids: Sequence[int], sampling: Sampling, show: bool) -> str:
        if not ids:
            raise ConfigError("the prompt is empty: it has no token. Give --prompt some text.")
        inputs = torch.tensor([list(ids)], device=self.model.device)
        streamer = (
            TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
            if show and sampling.num_beams == 1
            else None
        )
        torch.manual_seed(sampling.seed)
        generate = cast(Callable[..., Tensor], self.model.generate)
        tokens = generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            generation_config=self._settings(sampling),
            streamer=streamer,
        )
        text = self.tokenizer.decode(tokens[0, len(ids) :], skip_special_tokens=True)
        assert isinstance(text, str)
        if show and streamer is None:
            print(text, flush=True)
        return text


@contextlib.contextmanager
def open_generator(
    run_dir: Path,
    server: TrunkServer | None = None,
    cuts: CutLayers | None = None,
    client: OneClient | None = None,
) -> Iterator[TextGenerator]:
    """Open the model that a run ended with.

    Args:
        run_dir: The run's directory, with its final adapters.
        server: Where its trunk is; None: it is loaded into this process.
        cuts: Those of a client that had its own, for the model that it computed; None: the run's.
        client: Whose own model, where the method keeps factors private; None: there is one for all.

    Raises:
        ConfigError: The run's model does not generate text.
        RunDirectoryError: The run has no final adapters, the trunk server holds other weights, or
            ``client`` is missing, out of place or cannot be read.
        SplitError: The model cannot be loaded or cut.
        TrunkError: The trunk server does not answer, or refuses.
    """
    run = RunDirectory.open(run_dir)
    config = run.config
    if config.model.task != CAUSAL_LM:
        raise ConfigError(
            f'text is generated by models of model.task = "{CAUSAL_LM}", and this run has '
            f'"{config.model.task}". Export the adapter, and use it with transformers: flower-split export.'
        )
    tokenizer = load_tokenizer(config.model)
    span = model_cuts(config)
    cuts = cuts or span
    model = load_client_model(
        ModelSource.of(config.model),
        cuts,
        NoTrunk(),
        device=resolve_device(config.train.device, "train.device"),
    )
    attach_lora(model, span, held_parts(config, cuts), seed=config.seed, incomplete=("trunk",))
    trained = run.read_adapter("trunk") if config.mode == "joint" else {}
    stack = stack_of(model)
    adapter = read_client_adapter(run, client)
    own, middle = with_cuts(adapter, trained, stack, cuts, span)
    load_adapter_state(model, own)
    set_base_change(model, clients_own(read_base_change(run), trained, stack, cuts))
    with (
        _local(config, middle, cuts) if server is None else _remote(config, trained, server, cuts)
    ) as trunk:
        set_trunk(model, trunk)
        model.train(False)
        yield TextGenerator(model, tokenizer)


@contextlib.contextmanager
def _local(
    config: RunConfig, trained: Mapping[str, Tensor], cuts: CutLayers
) -> Iterator[nn.Module]:
    """Load the run's trunk between ``cuts`` into this process."""
    trunk = load_trunk_model(
        ModelSource.of(config.model),
        cuts,
        device=resolve_device(config.train.device, "train.device"),
    )
    if config.mode == "joint" and config.trunk.train == "full":
        own = dict(trunk.named_parameters())
        with torch.no_grad():
            for name, tensor in trained.items():
                own[name].copy_(tensor)
    elif config.mode == "joint":
        attach_lora(
            trunk,
            model_cuts(config),
            trunk_parts(config),
            seed=config.seed,
            incomplete=() if cuts == model_cuts(config) else ("trunk",),
        )
        load_adapter_state(trunk, trained)
    yield trunk


@contextlib.contextmanager
def _remote(
    config: RunConfig, trained: Mapping[str, Tensor], server: TrunkServer, cuts: CutLayers
) -> Iterator[nn.Module]:
    """Reach the run's trunk on a server, within an evaluation round of its own."""
    key = ClientKey()
    token = new_token(key.public)
    with contextlib.closing(
        TrunkCoordinator(
            server.address,
            server.token,
            root_certificates=server.root_certificates,
            certificate=server.certificate,
            proxy=server.proxy,
        )
    ) as coordinator:
        status = coordinator.status()
        if status.phase not in ("idle", "aborted", "done"):
            raise FlowerSplitError(
                f"the trunk at {server.address} is at work on round {status.server_round} of "
                f"experiment {status.experiment} ({status.phase}). Wait for the run to end, or leave "
                "--trunk-address out."
            )
        plan = RoundPlan(
            experiment=status.experiment or "generation",
            server_round=status.server_round,
            attempt=status.attempt + 1,
            participants={_SLOT: token},
            join_seconds=_LEASE_SECONDS,
            window_seconds=_LEASE_SECONDS,
            evaluate=True,
        )
        coordinator.begin_round(plan)
        try:
            _check_same_weights(trained, coordinator.get_adapter(), server.address)
            with RemoteTrunk(
                server.address,
                token=token,
                key=key,
                fingerprint=fingerprint(config),
                mode=config.mode,
                call_timeout=config.trunk.call_timeout,
                root_certificates=server.root_certificates,
                cuts=cuts,
                transport=config.trunk.transport,
                certificate=server.certificate,
                proxy=server.proxy,
            ) as trunk:
                trunk.open(0, evaluate=True)
                yield trunk
        finally:
            coordinator.commit_round(plan.experiment, plan.server_round, plan.attempt)


def _check_same_weights(
    mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], address: str
) -> None:
    if mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine):
        return
    raise RunDirectoryError(
        f"the trunk at {address} does not hold the trunk weights that the run ended with "
        "(adapters/trunk.safetensors). Leave --trunk-address out to load them into this process."
    )
