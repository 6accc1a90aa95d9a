"""The trunk: the middle layers of a model, run by the model's own forward.

Shapes: hidden states ``[batch, seq, hidden]``; padding mask and position ids ``[batch, seq]``.

The whole model's forward is called with the smashed data as its input embeddings, so that it
builds masks and rotary positions itself; where the first trunk layer begins, the smashed data
takes the place of whatever the prologue made, and where the last one ends, the forward ends.
"""

import copy
import functools
import inspect
import itertools
import math
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from flower_split.errors import SplitError
from flower_split.split.cache import CacheStep, TrunkCache
from flower_split.split.cuts import CutLayers
from flower_split.split.stack import LayerStack
from flower_split.split.stand_in import (
    Absent,
    AbsentEmbedding,
    LayerOutput,
    StandIn,
    hidden_states_of,
    put_hidden_states,
    replace_in_place,
    take_hidden_states,
)


@dataclass(frozen=True, slots=True)
class _Smashed:
    """What the first trunk layer begins with, and which layers are first and last."""

    hidden_states: Tensor
    first: nn.Module
    last: nn.Module
    random_state: list[Tensor] | None  # of the CPU, and of the GPU if there is one


# What the trunk forward that is running in this context begins with.
_smashed: ContextVar[_Smashed | None] = ContextVar("smashed", default=None)
# Whether that forward only finds out what reaches the first trunk layer.
_probing: ContextVar[bool] = ContextVar("probing", default=False)
_PROBE_SHAPE = (2, 3)  # batch, sequence


class _TrunkInput(BaseException):
    """Ends a probing forward at the trunk's first layer."""

    def __init__(self, hidden_states: Tensor) -> None:
        super().__init__()
        self.hidden_states = hidden_states


class _TrunkOutput(BaseException):
    """Ends a forward at the trunk's last layer. Not an Exception: no model may swallow it."""

    def __init__(self, hidden_states: Tensor) -> None:
        super().__init__()
        self.hidden_states = hidden_states


def _enter_trunk(
    module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]] | None:
    smashed = _smashed.get()
    if _probing.get():
        raise _TrunkInput(take_hidden_states(args, kwargs))
    if smashed is None or smashed.first is not module:
        return None
    if smashed.random_state is not None:
        _restore_random_state(smashed.random_state, smashed.hidden_states.device)
    return put_hidden_states(args, kwargs, smashed.hidden_states)


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _restore_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def _leave_trunk(module: nn.Module, args: tuple[object, ...], output: object) -> None:
    smashed = _smashed.get()
    if smashed is not None and smashed.last is module:
        raise _TrunkOutput(hidden_states_of(output))


class TrunkModel(nn.Module):
    """The trunk of a model, called as ``trunk(hidden_states, attention_mask, position_ids)``.

    Its parameters are the trunk layers' only and keep the unsplit model's names. Calls from
    several threads at once are fine. ``torch.autograd.grad`` through it works as through any
    module.

    Args:
        root: The model with everything outside the trunk replaced (:func:`carve_trunk`).
        stack: Where its layers are.
        cuts: The cut layers.
        output: The form of the family's layer outputs, shared with the stand-ins; set here.

    Raises:
        SplitError: The model's forward cannot be run from hidden states up to the trunk.
    """

    def __init__(
        self, root: PreTrainedModel, stack: LayerStack, cuts: CutLayers, output: LayerOutput
    ) -> None:
        super().__init__()
        self.cuts = cuts
        self.stack = stack
        self.config = root.config
        host = root.get_submodule(stack.host_path)
        # The host is held outside the module tree, and the children under their own names, so
        # that names are those of the unsplit model whether or not the host is its root.
        self._host = (host,)
        branch = stack.path.split(".", 1)[0]
        for name, child in root.named_children():
            if host is root or name == branch:
                self.add_module(name, child)
        self._layer_output = output
        self._hook_ends()
        # The shape of one position's hidden states; families with several streams have two sizes.
        self._position_shape = tuple(self._probe(output).shape[2:])
        self._caches: dict[int, TrunkCache] = {}  # of clients in this process
        self._spans: dict[CutLayers, TrunkModel] = {}

    def _hook_ends(self) -> None:
        """Let the forward begin and end at this trunk's first and last layer."""
        layers = self.stack.layers(self)
        self._ends = (layers[self.cuts.first], layers[self.cuts.second - 1])
        self._ends[0].register_forward_pre_hook(_enter_trunk, with_kwargs=True)
        self._ends[1].register_forward_hook(_leave_trunk)

    def span(self, cuts: CutLayers) -> "TrunkModel":
        """The trunk for clients with other cut layers: some of these layers, the same weights.

        What trains one trains the other. A client that holds some of this trunk's layers itself
        trains those for itself; the trunk trains them on the other clients' data alone.

        Args:
            cuts: Cut layers within this trunk's.

        Returns:
            A trunk of the layers between ``cuts``, made once; this trunk itself if they are its
            own. Attach adapters to this trunk, not to its spans.

        Raises:
            SplitError: The trunk does not hold all of these layers.
        """
        if cuts == self.cuts:
            return self
        if cuts.first < self.cuts.first or cuts.second > self.cuts.second:
            raise SplitError(
                f"this trunk holds layers {self.cuts.first} to {self.cuts.second - 1}; a client "
                f"with first cut {cuts.first} and second cut {cuts.second} would need layers "
                f"{cuts.first} to {cuts.second - 1}. Give the client more layers, or the trunk."
            )
        if cuts not in self._spans:
            self._spans[cuts] = self._make_span(cuts)
        return self._spans[cuts]

    def _make_span(self, cuts: CutLayers) -> "TrunkModel":
        memo: dict[int, object] = {id(self._spans): {}, id(self._caches): {}}
        for index, layer in enumerate(self.stack.layers(self)):
            shared = cuts.part_of(index) == "trunk"
            memo[id(layer)] = layer if shared else StandIn(layer, self._layer_output)
        span = copy.deepcopy(self, memo)
        span.cuts = cuts
        span._hook_ends()
        return span

    @property
    def hidden_size(self) -> int:
        """The width of the hidden states as they cross the cut layer."""
        return math.prod(self._position_shape)

    def _probe(self, output: LayerOutput) -> Tensor:
        """What reaches the first trunk layer; finds the form of the stand-ins' outputs."""
        host = self._host[0]
        weight = next(self.parameters())
        width = int(self.config.get_text_config(decoder=True).hidden_size)
        smashed = torch.zeros(*_PROBE_SHAPE, width, dtype=weight.dtype, device=weight.device)
        problems: dict[str, Exception] = {}
        token = _probing.set(True)
        try:
            for use_cache, length in itertools.product((None, False), (1, None, 2, 3, 4)):
                output.length = length
                try:
                    with torch.no_grad():
                        host(**host_inputs(host, smashed, width, None, None, use_cache))
                except _TrunkInput as reached:
                    found = reached.hidden_states
                    if found.dim() >= 3 and found.shape[:2] == _PROBE_SHAPE:
                        if use_cache is False:  # its stand-ins cannot fill the family's cache
                            forbid_cache(host)
                        return found
                except Exception as error:
                    problems.setdefault(f"{type(error).__name__}: {error}", error)
        finally:
            _probing.reset(token)
        raise SplitError(
            f"{type(host).__name__}'s forward does not bring hidden states of shape [batch, seq, "
            f"...] from its input embeddings to layer {self.cuts.first}"
            + (f" ({'; or '.join(problems)})" if problems else "")
            + ". This family cannot be split."
        ) from next(iter(problems.values()), None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TrunkModel":
        self._spans.clear()  # they have buffers of their own; span() makes them anew
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]

    def train(self, mode: bool = True) -> "TrunkModel":
        """Set training mode, also on the module whose forward is called."""
        super().train(mode)
        self._host[0].training = mode
        for span in self._spans.values():
            span.train(mode)
        return self

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        cache: CacheStep | None = None,
    ) -> Tensor:
        """Run the trunk layers.

        Args:
            hidden_states: Smashed data, ``[batch, seq, hidden]``.
            attention_mask: Padding mask, ``[batch, seq]``, nonzero where there is a token; None
                where nothing is padded.
            position_ids: ``[batch or 1, seq]``; None: the model's own default.
            use_cache: As the model's own argument; None: its configuration's. Without ``cache``
                nothing outlives the call, but a model may read the position ids otherwise, or
                compute with another memory layout and so with other last bits.
            cache: Go on from the keys and values kept in this process under its id.

        Returns:
            The last trunk layer's hidden states, ``[batch, seq, hidden]``.

        Raises:
            SplitError: The model's forward ended without reaching the trunk's last layer, or there
                is no such cache.
        """
        if cache is None:
            return self._run(hidden_states, attention_mask, position_ids, use_cache, None)
        if cache.step == 0:
            self._caches[cache.id] = TrunkCache(self.config)
        kept = self._caches.get(cache.id)
        if kept is None:
            raise SplitError(
                f"this trunk keeps no key-value cache {cache.id}. Begin generation anew."
            )
        kept.go_back(cache.past_length, cache.rows)
        return self.run_cached(kept, hidden_states, attention_mask, position_ids)

    def run_cached(
        self,
        kept: TrunkCache,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
    ) -> Tensor:
        """Run the trunk layers on new positions, after those in ``kept``, which grows by them.

        Args:
            kept: Keys and values; of no use any more if this raises.
            hidden_states: Smashed data of the new positions, ``[batch, seq, hidden]``.
            attention_mask: Their padding mask, ``[batch, seq]``, or None.
            position_ids: Theirs, ``[batch or 1, seq]``; None: the model's own default.

        Returns:
            The last trunk layer's hidden states, ``[batch, seq, hidden]``.
        """
        batch, seq = hidden_states.shape[:2]
        mask = kept.extend_mask(attention_mask, batch, seq)
        output = self._run(hidden_states, mask, position_ids, True, kept.cache)
        kept.advance(hidden_states, range(self.cuts.first, self.cuts.second))
        return output

    def release_cache(self, cache_id: int) -> None:
        """Forget the keys and values kept under ``cache_id``."""
        self._caches.pop(cache_id, None)

    def _run(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        use_cache: bool | None,
        past: DynamicCache | None,
    ) -> Tensor:
        host = self._host[0]
        width = int(self.config.get_text_config(decoder=True).hidden_size)
        inputs = host_inputs(host, hidden_states, width, attention_mask, position_ids, use_cache)
        if past is not None:
            inputs["past_key_values"] = past
        begin = hidden_states.view(*hidden_states.shape[:2], *self._position_shape)
        # A model's prologue may draw random numbers for dropout; the layers get those it left.
        state = _random_state(begin.device) if self.training else None
        token = _smashed.set(_Smashed(begin, *self._ends, state))
        try:
            host(**inputs)
        except _TrunkOutput as reached:
            return reached.hidden_states.flatten(2)
        finally:
            _smashed.reset(token)
        raise SplitError(
            f"{type(host).__name__}'s forward ended without calling layer "
            f"{self.cuts.second - 1}. This family does not run its layers as a chain."
        )


def forbid_cache(host: nn.Module) -> None:
    """Let a model run without a cache unless it is told otherwise."""
    config = getattr(host, "config", None)
    if config is not None:
        config.use_cache = False


def host_inputs(
    host: nn.Module,
    hidden_states: Tensor,
    width: int,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    use_cache: bool | None,
) -> dict[str, object]:
    """The arguments of the call that lets the model's own forward prepare its layers' inputs.

    Args:
        host: The module whose forward runs the layers.
        hidden_states: Smashed data; stands for the input embeddings as to shape and dtype.
        width: Of the input embeddings.
        attention_mask: Padding mask, ``[batch, seq]``, or None.
        position_ids: ``[batch or 1, seq]`` or None.
        use_cache: As the model's argument.
    """
    accepted = argument_names(type(host).forward)
    # A copy: a forward may scale its input embeddings in place.
    embeddings = hidden_states.detach().clone()
    if embeddings.shape[-1] != width or embeddings.dim() != 3:
        embeddings = embeddings.new_zeros(*embeddings.shape[:2], width)
    candidates: dict[str, object] = {
        "inputs_embeds": embeddings,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "use_cache": use_cache,
    }
    inputs = {name: value for name, value in candidates.items() if name in accepted}
    if "inputs_embeds" not in accepted and "hidden_states" in accepted:
        inputs["hidden_states"] = embeddings
    elif "inputs_embeds" not in accepted:
        main_input = getattr(host, "main_input_name", "input_ids")
        if main_input != "input_ids":  # pixels and the like, of which the absent module makes these
            inputs[main_input] = embeddings
        else:
            ids = torch.zeros(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
            inputs[main_input] = ids
    return inputs


@functools.lru_cache(maxsize=64)
def argument_names(forward: Callable[..., object]) -> frozenset[str]:
    """The names of a forward's own arguments."""
    return frozenset(inspect.signature(forward).parameters)


def carve_trunk(
    root: nn.Module,
    stack: LayerStack,
    cuts: CutLayers,
    output: LayerOutput,
    constants: frozenset[str],
) -> None:
    """Leave the trunk's weights alone in ``root``, in place.

    Args:
        root: The whole model.
        stack: Where its layers are.
        cuts: The cut layers.
        output: The form of layer outputs that the stand-ins share.
        constants: The embeddings that stay (:func:`constant_embeddings`).
    """
    replace_in_place(root, trunk_replacements(root, stack, cuts, output, constants))
    drop_outer_weights(root, stack)


def drop_outer_weights(root: nn.Module, stack: LayerStack) -> None:
    """Let nothing outside the layers be a parameter.

    Weights that lie directly in the modules around the layers become zeros, for what is computed
    with them before the first trunk layer does not matter; constant embeddings become buffers.
    """
    parts = stack.path.split(".")[:-1]
    for depth in range(len(parts) + 1):
        module = root.get_submodule(".".join(parts[:depth]))
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, torch.zeros_like(parameter.data), persistent=False)
    for name, module in list(root.named_modules()):
        if isinstance(module, nn.Embedding) and stack.index_of(name) is None:
            weight = module.weight.data
            del module.weight
            module.register_buffer("weight", weight)


def constant_embeddings(fresh: nn.Module) -> frozenset[str]:
    """The embeddings that a family never trains, such as tables of sinusoids, by name.

    The layers may be given what is looked up in them, so the trunk keeps them.

    Args:
        fresh: A model as its class makes it, on any device.
    """
    return frozenset(
        name
        for name, module in fresh.named_modules()
        if isinstance(module, nn.Embedding) and not module.weight.requires_grad
    )


def trunk_replacements(
    root: nn.Module,
    stack: LayerStack,
    cuts: CutLayers,
    output: LayerOutput,
    constants: frozenset[str],
) -> dict[str, nn.Module]:
    """What to put where, so that ``root`` keeps the trunk's weights alone.

    Layers outside the trunk become stand-ins; modules outside the stack that have parameters, and
    dropout (which would draw random numbers for nothing), become absent.

    Args:
        root: The whole model.
        stack: Where its layers are.
        cuts: The cut layers.
        output: The form of layer outputs that the stand-ins share.
        constants: The embeddings that stay (:func:`constant_embeddings`).

    Returns:
        Dotted name in ``root`` -> replacement.
    """
    replacements: dict[str, nn.Module] = {}
    for index, layer in enumerate(stack.layers(root)):
        if cuts.part_of(index) != "trunk":
            replacements[stack.layer_path(index)] = StandIn(layer, output)

    def walk(module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            child_path = f"{path}.{name}" if path else name
            if child_path == stack.path:
                continue
            if stack.path.startswith(child_path + "."):
                walk(child, child_path)
            elif isinstance(child, nn.Embedding):
                if child_path not in constants:
                    replacements[child_path] = AbsentEmbedding(child)
            elif isinstance(child, nn.Dropout) or any(True for _ in child.parameters()):
                replacements[child_path] = Absent(child)

    walk(root, "")
    return replacements
