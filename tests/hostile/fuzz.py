"""Fuzz of the live servicer as an authenticated participant, and of the codec.

``python -m tests.hostile.fuzz --calls 100000`` makes calls over gRPC to trunks of several families and
prints their statuses, what was INTERNAL or UNKNOWN, tracebacks in the trunk's log, and the slowest
call. ``--codec 1000000`` feeds mutated messages to the codec. It ends with 1 if anything was found.
"""

import argparse
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
import torch
import transformers

from flower_split.config import OptimizerConfig
from flower_split.errors import CodecError
from flower_split.proto import trunk_pb2 as pb
from flower_split.protocol.step_every import StepEvery
from flower_split.protocol.values import FinishRule, RoundPlan
from flower_split.split import CutLayers, split_model
from flower_split.trunk.compute.compute import TrunkCompute
from flower_split.trunk.engine.engine import TrunkEngine
from flower_split.trunk.engine.shares import Shares
from flower_split.wire.grpc_options import SERVICE, bearer, open_channel
from tests.hostile.fuzz_calls import Call, Chance, Known, any_call, mutated_messages
from tests.hostile.targets.messages import KINDS, UNPACED, read_message
from tests.support.loopback import served
from tests.support.tiny_configs import tiny_config
from tests.support.tiny_models import FAMILIES as CAUSAL
from tests.support.tiny_models import tiny_model

FAMILIES = {
    "llama": "AutoModelForCausalLM",
    "gptj": "AutoModelForCausalLM",
    "bloom": "AutoModelForCausalLM",
    "gemma3_text": "AutoModelForCausalLM",
    "mixtral": "AutoModelForCausalLM",
    "qwen3_vl": "AutoModelForImageTextToText",
    "t5": "AutoModelForSeq2SeqLM",
    "deberta-v2": "AutoModelForSequenceClassification",
}
PLANS: tuple[dict[str, object], ...] = (
    {},
    {"evaluate": True},
    {"step_every": StepEvery.SERVER_ROUND},
    {"step_every": StepEvery.CONTRIBUTION},
    {"finish": FinishRule(max_grad_norm=1.0, share_gradients=True)},
)
CALLS_PER_ROUND = 80
FINGERPRINT = {"model": "fuzz"}


@dataclass(slots=True)
class Findings:
    """What the calls of a run came to."""

    statuses: Counter[tuple[str, str]] = field(default_factory=Counter)
    internal: list[str] = field(default_factory=list)
    tracebacks: list[str] = field(default_factory=list)
    slowest: float = 0.0  # seconds
    slowest_call: str = ""
    changed: list[str] = field(default_factory=list)  # families whose weights have changed

    @property
    def bad(self) -> bool:
        """Whether there is something to mend."""
        return bool(self.internal or self.tracebacks or self.changed)


class Tracebacks(logging.Handler):
    """Keeps every log record that has a traceback."""

    def __init__(self, findings: Findings) -> None:
        super().__init__()
        self._findings = findings

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self._findings.tracebacks.append(
                logging.Formatter("").formatException(record.exc_info)[-2000:]
            )


class FuzzedTrunk:
    """A trunk of one family, served on loopback, with one participant that attacks.

    Args:
        family: Of its model.
        findings: Where what came of the calls is noted.
        attempt: Before that of the first round.
    """

    def __init__(self, family: str, findings: Findings, attempt: int = 0) -> None:
        if family in CAUSAL:
            model = tiny_model(family)
        else:
            torch.manual_seed(0)
            model = getattr(transformers, FAMILIES[family]).from_config(tiny_config(family))
        self.client, trunk = split_model(model, CutLayers(1, 3))
        trunk.requires_grad_(True)
        self.family, self.findings = family, findings
        self.hidden_size = trunk.hidden_size
        heads = getattr(trunk.config.get_text_config(decoder=True), "num_attention_heads", 1)
        self.heads = int(heads)
        self.engine = TrunkEngine(
            TrunkCompute(trunk, OptimizerConfig(name="sgd"), seed=0),
            mode="joint",
            hidden_size=trunk.hidden_size,
            fingerprint=FINGERPRINT,
            activation_bytes=1 << 24,
            cache_bytes=1 << 22,
            shares=Shares(evaluations=10),
        )
        self.digest = self.engine.compute.digest()
        self.round = attempt

    def begin(self, channel: grpc.Channel, plan: int | None = None) -> Known:
        """Begin the next round, and join it as slot 0; slot 1 joins and stays silent.

        Args:
            channel: To the trunk.
            plan: Which of the plans the round has; None: one after the other.
        """
        self.round += 1
        changes = PLANS[(self.round if plan is None else plan) % len(PLANS)]
        evaluate = bool(changes.get("evaluate"))
        self.engine.begin_round(
            RoundPlan(
                experiment="fuzz",
                server_round=1,
                attempt=self.round,
                participants={0: f"token-{self.round}", 1: "silent"},
                quorum=0.5,
                steps_per_round=2,
                **changes,
            )
        )
        self.engine.open_session("silent", FINGERPRINT, 2, evaluate)
        # Over the wire: the service remembers which token opened which session.
        request = pb.OpenSessionRequest(fingerprint=FINGERPRINT, planned_steps=2, evaluate=evaluate)
        grant = pb.OpenSessionReply.FromString(
            channel.unary_unary(f"/{SERVICE}/OpenSession")(
                request.SerializeToString(), timeout=20, metadata=bearer(f"token-{self.round}")
            )
        )
        return Known(
            session=grant.session,
            epoch=grant.trunk_epoch,
            token=f"token-{self.round}",
            server_round=1,
            attempt=self.round,
            version=grant.version,
            hidden_size=self.hidden_size,
            heads=self.heads,
        )

    def make(self, channel: grpc.Channel, call: Call, token: str) -> None:
        """Make one call and note what came of it."""
        path = f"/{SERVICE}/{call.method}"
        options = {"timeout": 20.0, "metadata": bearer(token)}
        started, text = time.perf_counter(), ""
        try:
            if call.stream:
                for _ in channel.stream_stream(path)(iter(call.frames), **options):
                    pass
            else:
                channel.unary_unary(path)(call.frames[0], **options)
            status = "OK"
        except grpc.RpcError as error:
            status, text = error.code().name, str(error.details())
        seconds = time.perf_counter() - started
        self.findings.statuses[call.method, status] += 1
        if status in ("INTERNAL", "UNKNOWN"):
            self.findings.internal.append(f"{self.family} {call.method}: {text}")
        if seconds > self.findings.slowest:
            self.findings.slowest = seconds
            self.findings.slowest_call = f"{self.family} {call.method} {status} {text[:100]}"

    def finish(self) -> None:
        """Give the last round up, and see whether the weights are what they were."""
        self.engine.abort_round("fuzz", 1, self.round, "the fuzz is over")
        if self.engine.compute.digest() != self.digest:
            self.findings.changed.append(self.family)


@contextmanager
def listening(findings: Findings) -> Iterator[None]:
    """Collect tracebacks of the trunk's log and gRPC's; their lines go nowhere else."""
    handler = Tracebacks(findings)
    loggers = [logging.getLogger(name) for name in ("flower_split", "grpc")]
    before = [logger.propagate for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, propagate in zip(loggers, before, strict=True):
            logger.propagate = propagate
            logger.removeHandler(handler)


def fuzz_calls(family: str, count: int, findings: Findings, seed: int = 0) -> None:
    """Make ``count`` calls to a trunk of ``family``; ``seed`` says which."""
    target, chance = FuzzedTrunk(family, findings), Chance(seed)
    with (
        listening(findings),
        served(target.engine, max_call_seconds=0.05, limits=UNPACED) as port,
        open_channel(f"127.0.0.1:{port}") as channel,
    ):
        known = target.begin(channel)
        for made in range(1, count + 1):
            target.make(channel, any_call(chance, known), known.token)
            if made % CALLS_PER_ROUND == 0:
                known = target.begin(channel)
        target.finish()


def fuzz_codec(count: int, seed: int = 0) -> Counter[str]:
    """Feed mutated messages to the codec; return outcomes by name. Anything but CodecError raises."""
    outcomes: Counter[str] = Counter()
    for frames in mutated_messages(seed, count):
        for kind in KINDS:
            try:
                read_message(frames, kind)
                outcomes[kind + "accepted"] += 1
            except CodecError:
                outcomes[kind + "CodecError"] += 1
    return outcomes


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.hostile.fuzz")
    parser.add_argument("--calls", type=int, default=0)
    parser.add_argument("--codec", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--family", choices=list(FAMILIES), action="append")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    findings = Findings()
    families = arguments.family or list(FAMILIES)
    started = time.monotonic()
    for index, family in enumerate(families if arguments.calls else ()):
        share = -(-arguments.calls // len(families))
        fuzz_calls(family, share, findings, arguments.seed + index)
    if arguments.calls:
        total = findings.statuses.total()
        print(f"{total} calls in {time.monotonic() - started:.0f} s to {', '.join(families)}")
        for (method, status), number in sorted(findings.statuses.items()):
            print(f"  {method:14} {status:20} {number:7}")
        print(
            f"INTERNAL or UNKNOWN: {len(findings.internal)}; tracebacks: {len(findings.tracebacks)}; "
            f"weights changed: {findings.changed or 'none'}"
        )
        print(f"slowest call: {findings.slowest:.3f} s ({findings.slowest_call})")
        for text in Counter(findings.tracebacks).most_common(20):
            print(text[1], "x", text[0])
    if arguments.codec:
        print(
            f"codec: {arguments.codec} messages, {dict(fuzz_codec(arguments.codec, arguments.seed))}"
        )
    return 1 if findings.bad else 0


if __name__ == "__main__":
    sys.exit(main())
