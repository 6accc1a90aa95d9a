"""``python -m tests.hostile.targets.corpus`` writes the corpus: what clients, trunks and runs really write.

The calls are those of one training step of tiny models of several families, as they arrived at a trunk;
beside them stand names, dtypes and shapes that broke a trunk once. What a fuzzer has found is in files
named ``found-...``, which the command leaves alone.
"""

import json
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from torch import Tensor

from flower_split.client.remote_trunk import RemoteTrunk
from flower_split.config import RunConfig, resolved_run_config
from flower_split.proto import trunk_pb2 as pb
from flower_split.protocol.values import RoundPlan
from flower_split.runs.directory import RunDirectory
from flower_split.runs.manifest import RunCheckpoints
from flower_split.runs.private_factors import PrivateFolder, private_state
from flower_split.split import set_trunk
from flower_split.trunk.engine.checkpoint_store import CheckpointStore
from flower_split.trunk.service.audit_log import AuditLog, Event
from flower_split.wire.codecs import Coded, make_codec
from flower_split.wire.sending import Outgoing
from tests.hostile.fuzz import FAMILIES as AUTO_CLASSES
from tests.hostile.fuzz import FINGERPRINT, Findings, FuzzedTrunk
from tests.hostile.fuzz_calls import DTYPES, NAMES, Call, spiky
from tests.hostile.targets.files import (
    ADAPTER_FILE,
    DIGEST,
    EXPERIMENT,
    ROUNDS_SHA256,
    RUN_FILES,
    TENSORS_SHA256,
    TRUNK_FILE,
)
from tests.hostile.targets.messages import ANYWHERE, METHODS, calls_input, codec_input
from tests.hostile.targets.servicer import FIRST_ATTEMPT, addressed, stranger_input
from tests.hostile.targets.target import CORPUS, joined
from tests.support.loopback import Recorder, served
from tests.unit.split.coverage import TASKS

FAMILIES = ("llama", "gemma3_text", "bloom", "qwen3_vl", "t5", "deberta-v2")
FOUND = "found-"
Named = tuple[str, bytes]


# ---- calls


def step_of(family: str) -> list[Call]:
    """Return the calls of one training step of a client of that family, addressed to anybody."""
    trunk, recorder = FuzzedTrunk(family, Findings()), Recorder()
    task = next(task for task in TASKS.values() if task.auto_class == AUTO_CLASSES[family])
    batch = next(task.batches(trunk.client))[1]
    attempt = FIRST_ATTEMPT
    with served(trunk.engine, interceptors=[recorder]) as port:
        trunk.engine.begin_round(
            RoundPlan(experiment="fuzz", server_round=1, attempt=attempt, participants={0: "t"})
        )
        with RemoteTrunk(
            f"127.0.0.1:{port}",
            token="t",
            fingerprint=FINGERPRINT,
            mode="joint",
            call_timeout=60.0,
            transport="grpc",
        ) as remote:
            grant = remote.open(2)
            set_trunk(trunk.client.requires_grad_(False), remote)
            trunk.client.get_input_embeddings().requires_grad_(True)
            with remote.micro_batch(0, 0, num_tokens=8.0, loss_denominator=8.0, last=True):
                loss = trunk.client(**batch).loss
            loss.backward()
    known = replace(ANYWHERE, session=grant.session, epoch=grant.epoch, attempt=attempt)
    calls: list[Call] = []
    for method, frame in recorder.requests:
        frame = addressed(frame, known, ANYWHERE)
        if calls and calls[-1].method == method and method in ("Forward", "Backward"):
            calls[-1] = Call(method, [*calls[-1].frames, frame])
        elif method in METHODS:
            calls.append(Call(method, [frame]))
    return calls


def key(micro_batch: int = 0) -> pb.ContributionKey:
    return pb.ContributionKey(
        experiment="fuzz", server_round=1, attempt=ANYWHERE.attempt, micro_batch=micro_batch
    )


def forward(tensors: dict[str, Tensor], **changes: object) -> Call:
    """A forward with these tensors beside the hidden states."""
    header = pb.ForwardHeader(session=ANYWHERE.session, trunk_epoch=ANYWHERE.epoch, mode=pb.TRAIN)
    header.key.CopyFrom(key())
    header.MergeFrom(pb.ForwardHeader(**changes))
    found = {"hidden_states": torch.ones(2, 3, ANYWHERE.hidden_size), **tensors}
    return Call("Forward", list(Outgoing(pb.Header(forward=header), found).frames()))


def backward(grad: Tensor, **changes: object) -> Call:
    """A backward of that forward."""
    header = pb.BackwardHeader(
        session=ANYWHERE.session,
        trunk_epoch=ANYWHERE.epoch,
        key=key(),
        num_tokens=6.0,
        loss_denominator=6.0,
    )
    header.MergeFrom(pb.BackwardHeader(**changes))
    found = {"trunk_output_grad": grad}
    return Call("Backward", list(Outgoing(pb.Header(backward=header), found).frames()))


def chunked(call: Call, size: int = 200) -> Call:
    """The same call in frames of so many bytes, as a large one travels."""
    header = pb.Frame(header=pb.Frame.FromString(call.frames[0]).header).SerializeToString()
    payload = b"".join(pb.Frame.FromString(frame).payload for frame in call.frames)
    parts = [payload[at : at + size] for at in range(0, len(payload), size)]
    return Call(call.method, [header, *(pb.Frame(payload=p).SerializeToString() for p in parts)])


def calls() -> Iterator[Named]:
    """Every call of a client, right, and wrong as some were that broke a trunk once."""
    for family in FAMILIES:
        made = step_of(family)
        yield f"step-{family}", calls_input(made)
        if family == "llama":
            short = [forward({}), backward(torch.ones(2, 3, ANYWHERE.hidden_size))]
            yield "step-in-small-frames", calls_input([chunked(call) for call in short])
    for name in NAMES:
        likely = torch.arange(6).view(2, 3) if name == "position_ids" else torch.ones(2, 3)
        yield f"forward-with-{name.replace('/', '-')}", calls_input([forward({name: likely})])
    for dtype in DTYPES:
        mask = torch.ones(2, 3).to(dtype)
        name = str(dtype).removeprefix("torch.")
        yield f"mask-of-{name}", calls_input([forward({"attention_mask": mask})])
    one = torch.ones(2, 3, ANYWHERE.hidden_size)
    lies = {
        "denominator-1e300": {"loss_denominator": 1e300},
        "denominator-nan": {"loss_denominator": float("nan")},
        "tokens-minus-one": {"num_tokens": -1.0},
    }
    for name, lie in lies.items():
        yield f"backward-with-{name}", calls_input([forward({}), backward(one, **lie)])
    yield "backward-times-1e30", calls_input([forward({}), backward(1e30 * one)])
    cached = forward({}, mode=pb.EVALUATE, cache=pb.CacheUse(id=1), use_cache=True)
    yield "evaluation-with-a-cache", calls_input([cached], plan=1)
    yield "caches-released", calls_input([forward({}, released_caches=list(range(50)))])
    named = {"session": ANYWHERE.session, "trunk_epoch": ANYWHERE.epoch}
    finish = pb.FinishStepHeader(**named, key=key(), grad_norm_squared=1.0)
    frames = list(Outgoing(pb.Header(finish_step=finish), {"lora": torch.ones(2)}).frames())
    yield "finish-step", calls_input([Call("FinishStep", frames)], plan=4)
    for request in (
        pb.WaitVersionRequest(**named, version=0),
        pb.ShortenPlanRequest(**named, planned_steps=1),
        pb.ShareMemoryRequest(boot_id="elsewhere", user=1000),
        pb.CloseSessionRequest(**named),
        pb.OpenSessionRequest(fingerprint=FINGERPRINT, cuts=pb.CutLayers(first=3, second=1)),
    ):
        method = type(request).__name__.removesuffix("Request")
        yield method, calls_input([Call(method, [request.SerializeToString()])])


def messages() -> Iterator[Named]:
    """One message of each kind, by each codec."""
    step = {call.method: call for call in step_of("llama")}
    for method in ("Forward", "Backward"):
        yield f"native-{method}", codec_input(step[method].frames)
    yield "native-frames", codec_input(chunked(forward({})).frames)
    every = {str(dtype): torch.ones(2, 3).to(dtype) for dtype in (*DTYPES, torch.float64)}
    every |= {"empty": torch.ones(0, 3), "scalar": torch.tensor(1.0)}
    reply = pb.Header(reply=pb.ReplyHeader(version=3))
    yield "every-dtype", codec_input(list(Outgoing(reply, every).frames()))
    coded = Coded(make_codec("int8"), "hidden_states").encode(spiky((1, 2, 130)))
    header = pb.Header(forward=pb.ForwardHeader(session="s", mode=1))
    yield "int8", codec_input(list(Outgoing(header, coded).frames()), "int8 ")
    rows = Coded(make_codec("native"), "hidden_states", without_zeros=True)
    grad = torch.zeros(2, 3, 4)
    grad[0, 1] = 1.0
    header = pb.Header(backward=pb.BackwardHeader(session="s", num_tokens=1.0))
    yield "rows", codec_input(list(Outgoing(header, rows.encode(grad)).frames()), "rows ")


def strangers() -> Iterator[Named]:
    """Calls without a credential."""
    for method in (*METHODS, "BeginRound", "Status", "NoSuchMethod"):
        path = f"flower_split.Trunk/{method}"
        yield method, stranger_input(path, "", b"", b"\0" * 9)
    frames = forward({}).frames
    forwards = "flower_split.Trunk/Forward"
    yield "guess", stranger_input(forwards, "Bearer token", bytes(72), *frames)
    yield "token-of-a-key", stranger_input(forwards, "Bearer a." + "A" * 43, bytes(72), *frames)
    yield "no-bearer", stranger_input(forwards, "Basic dTpw", b"x", *frames)
    yield "health", stranger_input("grpc.health.v1.Health/Check", "", b"", b"")
    yield "health-watch", stranger_input("grpc.health.v1.Health/Watch", "", b"", b"")
    yield "health-noise", stranger_input("grpc.health.v1.Health/Check", "", b"", b"\xff" * 9)
    reflection = "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    yield "reflection", stranger_input(reflection, "", b"", b"")


# ---- files


def files() -> Iterator[tuple[str, str, bytes]]:
    """What a trunk, a run and a client keep: folder, name, content."""
    adapter = {"model.layers.0.q_proj.lora_A.weight": torch.ones(2, 3)}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        yield from _manifests(folder / "run", adapter)
        yield from _checkpoints(folder / "trunk", adapter)
        yield from _run_directory(folder / "directory", adapter)
        private = PrivateFolder(folder / "private")
        first = private.write(adapter, server_round=1, base="")
        second = private.write(adapter, server_round=2, base=first)
        for number, digest in ((1, first), (2, second)):
            path = folder / "private" / f"round-{number}.{digest}.safetensors"
            yield "private-factors", f"round-{number}", path.read_bytes()
        audit = folder / "audit.jsonl"
        with AuditLog(audit) as log:
            log.note(Event(peer="ipv4:127.0.0.1:1", subject="abc", rpc="Forward", key="window=1"))
            log.note(Event(peer="p", subject="", rpc="Forward", outcome="REFUSED", reason="X"))
        yield "audit-log", "three-lines", audit.read_bytes()


def _manifests(folder: Path, adapter: dict[str, Tensor]) -> Iterator[tuple[str, str, bytes]]:
    checkpoints = RunCheckpoints(folder)
    for number in (0, 1):
        checkpoints.commit(
            experiment=EXPERIMENT,
            server_round=number,
            attempt=0,
            trunk_digest=DIGEST,
            trunk_version=number,
            adapter=adapter,
            strategy=private_state({0: DIGEST}),
        )
    texts = []
    for name in ("MANIFEST", "MANIFEST.previous"):
        values = json.loads((folder / name).read_bytes())
        for entry in values["rounds"]:
            tensors = (folder / entry["file"]).read_bytes()
            entry |= {"file": ADAPTER_FILE, "file_sha256": TENSORS_SHA256.decode()}
        values["sha256"] = ROUNDS_SHA256.decode()
        texts.append(json.dumps(values).encode())
    yield "manifest", "two-rounds", joined([texts[0], tensors, texts[1]])
    yield "manifest", "one-round", joined([texts[1], tensors])


def _checkpoints(folder: Path, adapter: dict[str, Tensor]) -> Iterator[tuple[str, str, bytes]]:
    CheckpointStore(folder).save(
        adapter,
        experiment=EXPERIMENT,
        server_round=1,
        attempt=0,
        version=1,
        digest=DIGEST,
        ledger="",
    )
    (path,) = folder.glob("*/trunk-1.json")
    values = json.loads(path.read_bytes())
    tensors = path.with_name(values["file"]).read_bytes()
    values |= {"file": TRUNK_FILE, "file_sha256": TENSORS_SHA256.decode()}
    yield "checkpoint", "round-1", joined([json.dumps(values).encode(), tensors])


def _run_directory(folder: Path, adapter: dict[str, Tensor]) -> Iterator[tuple[str, str, bytes]]:
    run = RunDirectory.create(replace(RunConfig(), run_dir=str(folder)))
    run.append("round", {"server_round": 1, "train_loss": 2.0})
    run.write_adapter("client", adapter)
    run.write_outcome([], facts={"seconds": 1.0})
    for index, name in enumerate(RUN_FILES):
        content = (folder / name).read_bytes()
        if name == "config.json":  # what differs from the defaults is enough
            some = dict(list(resolved_run_config(run.config).items())[:12])
            content = json.dumps(some).encode()
        yield "run-directory", name.replace("/", "-"), bytes([index]) + content


def everything() -> Iterator[tuple[str, str, bytes]]:
    """Every input of the corpus: folder, name, content."""
    kinds: dict[str, Iterator[Named]] = {
        "codec": messages(),
        "calls": calls(),
        "stranger": strangers(),
    }
    for folder, named in kinds.items():
        yield from ((folder, name, data) for name, data in named)
    yield from files()


def main() -> None:
    """Write the corpus anew, but for what was found."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # steps are left early
    transformers.utils.logging.set_verbosity_error()
    inputs = list(everything())
    for path in CORPUS.glob("*/*"):
        if not path.name.startswith(FOUND):
            path.unlink()
    for folder, name, data in inputs:
        (CORPUS / folder).mkdir(parents=True, exist_ok=True)
        (CORPUS / folder / name).write_bytes(data)
    sizes = [path.stat().st_size for path in CORPUS.glob("*/*")]
    print(f"{len(sizes)} inputs, {sum(sizes):,} bytes in {CORPUS}")


if __name__ == "__main__":
    main()
