"""What a participant with a valid token may send, drawn at random: mostly right, partly not.

A call that is wrong everywhere is refused by the first check. So every field is drawn as it should be
most of the time, and each tensor from the names, dtypes and shapes that models take somewhere.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flower_split.proto import trunk_pb2 as pb
from flower_split.wire.codecs import Coded, make_codec
from flower_split.wire.sending import Outgoing
from tests.hostile.targets.target import mutated

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)
NAMES = (
    "attention_mask",
    "attention_mask/full_attention",
    "attention_mask/sliding_attention",
    "attention_mask/chunked_attention",
    "attention_mask/self",
    "position_ids",
    "layer_argument/2",
    "layer_argument/position_bias",
    "layer_argument/rel_embeddings",
    "layer_argument/hidden_states",
    "layer_argument/self",
    "host_argument/attention_mask",
    "host_argument/attention_mask.full_attention",
    "host_argument/attention_mask.sliding_attention",
    "host_argument/visual_pos_masks",
    "host_argument/deepstack_visual_embeds.0",
    "host_argument/deepstack_visual_embeds.1",
    "host_argument/past_key_values",
    "host_argument/input_ids",
    "host_argument/self",
    "cache_rows",
    "labels",
    "hidden_states/scale",
    "hidden_states.rows",
    "trunk_output_grad.rows",
)
NUMBERS = (0, 1, 2, 3, 7, 63, 64, 65, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1)
REALS = (0.0, 1.0, 2.0, 3.5, 1e-300, 1e300, -1.0, math.inf, -math.inf, math.nan)
VALUES = (0.0, 1.0, 0.5, -1.0, 1e4, 3e38, -3e38, math.inf, math.nan)


@dataclass(frozen=True, slots=True)
class Known:
    """What the participant has been told, and what its calls are made of."""

    session: str
    epoch: int
    token: str
    server_round: int
    attempt: int
    version: int
    hidden_size: int
    heads: int


@dataclass(frozen=True, slots=True)
class Call:
    """One call as it travels."""

    method: str
    frames: Sequence[bytes]
    stream: bool = True


class Chance(random.Random):
    """A seeded source of calls."""

    def once_in(self, every: int) -> bool:
        """True once in so many times."""
        return self.randrange(every) == 0

    def mostly(self, right: object, others: Sequence[object], every: int = 40) -> object:
        """``right``, but one of the others once in ``every``."""
        return self.choice(others) if self.once_in(every) else right

    def text(self, longest: int) -> str:
        """Characters from anywhere in Unicode, surrogates excluded."""
        points = (
            self.choice((self.randrange(0x20, 0x7F), self.randrange(0xD800)))
            for _ in range(longest)
        )
        return "".join(map(chr, points))[: self.randint(1, longest)]


def usual_shape(micro_batch: int) -> tuple[int, int]:
    """Rows and positions of a micro-batch, so that a backward fits its forward most of the time."""
    return 1 + micro_batch % 3, 3 + micro_batch % 2


def tensors(chance: Chance, known: Known, name: str, batch: int, seq: int) -> Tensor:
    """A tensor called ``name`` beside hidden states ``[batch, seq, hidden]``."""
    sizes = (1, batch, seq, known.heads, known.hidden_size, 0, 2, 5, 66)
    likely = {
        "hidden_states": [(batch, seq, known.hidden_size)],
        "trunk_output_grad": [(batch, seq, known.hidden_size)],
        "position_ids": [(batch, seq), (1, seq), (3, batch, seq), (3, 1, seq)],
        "cache_rows": [(batch,)],
        "layer_argument/rel_embeddings": [(16, known.hidden_size)],
    }.get(
        name,
        [
            (batch, seq),
            (batch, 1, seq, seq),
            (1, 1, seq, seq),
            (batch, known.heads, seq, seq),
            (0,),
            (batch * seq, known.hidden_size),
        ],
    )
    if not chance.once_in(20):
        shape = chance.choice(likely) if chance.once_in(3) else likely[0]
    else:
        shape = tuple(chance.choices(sizes, k=chance.randrange(6)))
        if math.prod(shape) > 1 << 18:
            shape = shape[:2]
    right = torch.float32
    if name == "position_ids" or name == "cache_rows":
        right = torch.int64
    elif "mask" in name:
        right = chance.choice((torch.bool, torch.bool, torch.float32))
    dtype = chance.mostly(right, DTYPES, 20)
    value = chance.mostly(1.0, VALUES, 25)
    if name == "position_ids" and shape and shape[-1] == seq:
        row = torch.arange(seq) + chance.mostly(0, (60, -1, 2**40), 6)
        return row.expand(shape).to(dtype).clone()
    if dtype.is_floating_point:
        return torch.full(shape, value).to(dtype)
    number = chance.mostly(1, (0, 2, -1, 200, 2**62), 8)
    info = 1 if dtype == torch.bool else torch.iinfo(dtype).max
    return torch.full(shape, min(max(number, 0 if dtype == torch.uint8 else -1), info)).to(dtype)


def keys(chance: Chance, known: Known) -> pb.ContributionKey:
    """A contribution's name, of the participant's own round for the most part."""
    return pb.ContributionKey(
        experiment=chance.mostly("fuzz", ("", "other")),
        server_round=chance.mostly(known.server_round, NUMBERS[:10]) & 0xFFFFFFFF,
        attempt=chance.mostly(known.attempt, NUMBERS[:10]) & 0xFFFFFFFF,
        window=chance.mostly(0, NUMBERS[:10]) & 0xFFFFFFFF,
        micro_batch=chance.mostly(chance.randint(0, 4), (2**32 - 1, 2**31)),
    )


def forwards(chance: Chance, known: Known) -> Call:
    """A forward in any mode, with any tensors beside the hidden states."""
    key = keys(chance, known)
    batch, seq = usual_shape(key.micro_batch)
    if chance.randint(0, 3) == 2:
        batch, seq = chance.choice(((1, 1), (2, 1), (1, 2), (3, 63), (1, 64), (1, 65)))
    header = pb.ForwardHeader(
        session=chance.mostly(known.session, ("", "0" * 32, "\u2603")),
        trunk_epoch=chance.mostly(known.epoch, NUMBERS),
        version=chance.mostly(known.version, NUMBERS),
        mode=chance.mostly(chance.choice((1, 1, 2, 3)), (0, 4)),
        acknowledged=chance.mostly(0, NUMBERS[:10]),
    )
    if not chance.once_in(30):
        header.key.CopyFrom(key)
    if chance.random() < 0.5:
        header.use_cache = chance.random() < 0.5
    if header.mode == 3 and (chance.random() < 0.5) or chance.randint(0, 29) == 7:
        step = chance.choice((0, 0, 0, 1, 2))
        header.cache.id = chance.mostly(1, (2, 3, *NUMBERS), 4)
        header.cache.step = chance.mostly(step, NUMBERS)
        header.cache.past_length = chance.mostly(step * 3, (1, 2, 3, 5, *NUMBERS), 6)
    if chance.once_in(10):
        header.released_caches.extend(chance.choices(NUMBERS, k=3))
    names = chance.sample(NAMES, chance.choice((0, 1, 1, 2, 3)))
    if chance.random() < 0.6:  # what most families take
        names = chance.choice(([], ["attention_mask"], ["attention_mask", "position_ids"]))
    if chance.randint(0, 29) == 7:
        names.append(chance.text(40))
    found = {name: tensors(chance, known, name, batch, seq) for name in names}
    if chance.randint(0, 29) != 7:
        found["hidden_states"] = tensors(chance, known, "hidden_states", batch, seq)
    return Call("Forward", damaged(chance, pb.Header(forward=header), found))


def backwards(chance: Chance, known: Known) -> Call:
    """A backward, of a forward that was made or not."""
    key = keys(chance, known)
    batch, seq = chance.mostly(usual_shape(key.micro_batch), ((1, 1), (2, 5), (1, 65)))
    header = pb.BackwardHeader(
        session=chance.mostly(known.session, ("", "x")),
        trunk_epoch=chance.mostly(known.epoch, NUMBERS),
        key=key,
        version=chance.mostly(known.version, NUMBERS),
        num_tokens=chance.mostly(1.0, REALS, 12),
        loss_denominator=chance.mostly(1.0, REALS, 12),
        last=(chance.random() < 0.5),
    )
    name = chance.mostly("trunk_output_grad", ("smashed_grad", "hidden_states", "x"))
    found = {name: tensors(chance, known, "trunk_output_grad", batch, seq)}
    return Call("Backward", damaged(chance, pb.Header(backward=header), found))


def finishes(chance: Chance, known: Known) -> Call:
    """The end of a step, with gradients of any names."""
    header = pb.FinishStepHeader(
        session=known.session,
        trunk_epoch=known.epoch,
        key=keys(chance, known),
        grad_norm_squared=chance.mostly(1.0, REALS, 12),
    )
    names = {chance.text(8) for _ in range(chance.randrange(3))}
    found = {name: tensors(chance, known, "gradient", 1, 2) for name in names}
    return Call("FinishStep", damaged(chance, pb.Header(finish_step=header), found))


def controls(chance: Chance, known: Known) -> Call:
    """A control call: a client's, or one that is the coordinator's alone."""
    session = chance.mostly(known.session, ("", "x"))
    epoch = chance.mostly(known.epoch, NUMBERS)
    message = chance.choice(
        (
            pb.OpenSessionRequest(
                fingerprint=chance.mostly(
                    {"model": "fuzz"}, ({}, {"model": "other"}, {"x" * 500: "y"})
                ),
                planned_steps=chance.mostly(2, NUMBERS[:10]),
                evaluate=(chance.random() < 0.5),
                cuts=chance.mostly(
                    None,
                    [
                        pb.CutLayers(first=first, second=second)
                        for first, second in ((1, 2), (0, 9), (3, 1), (2**32 - 1, 0))
                    ],
                ),
            ),
            pb.WaitVersionRequest(
                session=session, trunk_epoch=epoch, version=chance.choice(NUMBERS)
            ),
            pb.BeginRoundRequest(experiment="fuzz", server_round=9),
            pb.PrepareRoundRequest(experiment="fuzz", server_round=known.server_round),
            pb.CommitRoundRequest(experiment="fuzz", server_round=known.server_round),
            pb.AbortRoundRequest(experiment="fuzz", server_round=known.server_round),
            pb.StatusRequest(),
        )
    )
    data = message.SerializeToString()
    if chance.once_in(10):
        data = chance.randbytes(chance.randrange(40))
    name = type(message).__name__.removesuffix("Request")
    return Call(chance.mostly(name, ("GetAdapter", "NoSuchMethod")), [data], stream=False)


def damaged(chance: Chance, header: pb.Header, found: dict[str, Tensor]) -> list[bytes]:
    """The frames of a message, of one in ten with a fault."""
    frames = list(Outgoing(header, found).frames())
    fault = chance.randint(0, 79)
    if fault == 0:
        return frames[:-1]
    if fault == 1:
        return [*frames, frames[-1]]
    if fault == 2:
        at = chance.randint(0, len(frames[0]) - 1)
        frames[0] = frames[0][:at] + chance.randbytes(chance.randrange(4)) + frames[0][at + 1 :]
    if fault == 3:
        frames[0] = frames[0][: chance.randint(0, len(frames[0]))]
    return frames


def any_call(chance: Chance, known: Known) -> Call:
    """Any call of the participant."""
    kinds = (forwards, backwards, finishes, controls)
    return chance.choices(kinds, (12, 5, 1, 2))[0](chance, known)


def spiky(shape: tuple[int, int, int]) -> Tensor:
    """Activations [batch, seq, hidden] of about unit size with two channels that stand out."""
    tensor = torch.linspace(-1, 1, math.prod(shape)).view(shape)
    tensor[..., [2, 70]] *= 100
    return tensor


def mutated_messages(seed: int, count: int) -> Iterator[list[bytes]]:
    """Frame streams for the codec: valid ones with bytes changed, cut, doubled, swapped."""
    chance = random.Random(seed)
    headers = [
        pb.Header(forward=pb.ForwardHeader(session="s", mode=1)),
        pb.Header(backward=pb.BackwardHeader(session="s", num_tokens=1.0)),
        pb.Header(reply=pb.ReplyHeader(version=3)),
    ]
    found = {
        "hidden_states": torch.ones(2, 3, 4),
        "attention_mask": torch.ones(2, 3, dtype=torch.bool),
        "position_ids": torch.arange(6).view(2, 3),
    }
    seeds = [list(Outgoing(header, found).frames()) for header in headers]
    seeds.append([frame for frame in Outgoing(headers[0], {"x": torch.ones(300_000)}).frames()])
    coded = Coded(make_codec("int8"), "hidden_states").encode(spiky((2, 3, 130)))
    seeds.append(list(Outgoing(headers[0], coded).frames()))
    rows = {"hidden_states": torch.ones(1, 2, 4), "hidden_states.rows": torch.eye(2)[..., None] > 0}
    seeds.append(list(Outgoing(headers[1], rows).frames()))
    weights = (30, 30, 30, 1, 60, 30)
    for _ in range(count):
        frames = list(chance.choices(seeds, weights)[0])
        for _ in range(chance.choice((1, 1, 2, 4))):
            index = chance.randrange(len(frames))
            if chance.randrange(6) == 0:
                frames.insert(index, frames[index])
            else:
                frames[index] = mutated(chance, frames[index])
        yield frames
