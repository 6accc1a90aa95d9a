"""Which of the trunk's layers the calls of a client run.

A client that keeps more layers than the trunk leaves out has cut layers within the trunk's, and its
calls run the trunk's layers between them, with the same weights as everybody else's calls. A
parameter of another layer gets no gradient from that client, and its tokens do not count there.

Shapes: hidden states ``[batch, seq, hidden]``.
"""

from collections.abc import Sequence

import torch
from torch import nn

from flower_split.errors import RefusalReason, SplitError, TrunkRefused
from flower_split.split import CutLayers, TrunkModel

_PROBE_SHAPE = (2, 3)  # batch, sequence
_TOLERANCE = 1e-2  # relative; a layer that misses what another one left is far off


class Spans:
    """The spans of one trunk. Only the compute thread calls it, but for :meth:`is_admitted`.

    Args:
        trunk: A :class:`TrunkModel` has spans; any other module runs as a whole.
        device: The trunk's.
        dtype: The dtype of its base weights.
    """

    def __init__(self, trunk: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self._trunk = trunk
        self._device, self._dtype = device, dtype
        self._admitted: set[CutLayers] = set()

    def is_admitted(self, cuts: CutLayers | None) -> bool:
        """Return whether :meth:`admit` has found nothing wrong with ``cuts``; any thread may ask."""
        return cuts is None or cuts in self._admitted

    def admit(self, cuts: CutLayers) -> None:
        """Check once that the trunk can run what is between ``cuts``.

        Beyond the layers being there, the trunk in pieces must compute what it computes as a whole:
        a family whose layers hand each other more than hidden states fails that, or fails to run.

        Raises:
            TrunkRefused: The trunk does not hold all of these layers (FINGERPRINT_MISMATCH), or
                cannot be divided there (INVALID_REQUEST).
        """
        if cuts in self._admitted:
            return
        trunk = self._trunk
        if not isinstance(trunk, TrunkModel):
            raise TrunkRefused(
                RefusalReason.INVALID_REQUEST,
                f"this trunk ({type(trunk).__name__}) runs as a whole only, and a client asks for the "
                f"layers between its own cuts {cuts.first} and {cuts.second}.",
            )
        try:
            trunk.span(cuts)
        except SplitError as error:
            raise TrunkRefused(RefusalReason.FINGERPRINT_MISMATCH, str(error)) from error
        if cuts != trunk.cuts:
            self._check_weights(trunk, cuts)
            self._check_pieces(trunk, cuts)
        self._admitted.add(cuts)

    def of(self, cuts: CutLayers | None) -> nn.Module:
        """Return what runs a client's calls; None: the whole trunk."""
        if cuts is None or not isinstance(self._trunk, TrunkModel):
            return self._trunk
        return self._trunk.span(cuts)

    def covers(self, cuts: CutLayers | None, names: Sequence[str]) -> tuple[bool, ...] | None:
        """Return which parameters a client's calls pass through; None: all of them.

        Args:
            cuts: The client's.
            names: The parameters', by the trunk's names.
        """
        if cuts is None or not isinstance(self._trunk, TrunkModel) or cuts == self._trunk.cuts:
            return None
        indices = [self._trunk.stack.index_of(name) for name in names]
        return tuple(index is not None and cuts.part_of(index) == "trunk" for index in indices)

    def _check_weights(self, trunk: TrunkModel, cuts: CutLayers) -> None:
        """Refuse cuts that part layers which share a weight."""
        places: dict[int, set[str]] = {}
        for name, parameter in trunk.named_parameters(remove_duplicate=False):
            index = trunk.stack.index_of(name)
            if index is not None:
                places.setdefault(id(parameter), set()).add(cuts.part_of(index))
        if any(len(parts) > 1 for parts in places.values()):
            raise _cannot_divide(cuts, "layers on both sides of a cut share a weight")

    def _check_pieces(self, trunk: TrunkModel, cuts: CutLayers) -> None:
        """Refuse cuts where the trunk in pieces is not the trunk."""
        borders = sorted({trunk.cuts.first, cuts.first, cuts.second, trunk.cuts.second})
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(*_PROBE_SHAPE, trunk.hidden_size, generator=generator)
        probe = probe.to(self._device, self._dtype)
        training = trunk.training
        trunk.eval()
        try:
            with torch.no_grad():
                whole = trunk(probe)
                pieces = probe
                for first, second in zip(borders, borders[1:], strict=False):
                    trunk(-probe)  # what layers leave beside the hidden states is of other data now
                    pieces = trunk.span(CutLayers(first, second))(pieces)
        except Exception as error:
            raise _cannot_divide(cuts, f"{type(error).__name__}: {error}") from error
        finally:
            trunk.train(training)
        off = torch.linalg.vector_norm((pieces - whole).float())
        if not bool(off <= _TOLERANCE * torch.linalg.vector_norm(whole.float())):
            raise _cannot_divide(cuts, "its layers hand each other more than hidden states there")


def _cannot_divide(cuts: CutLayers, why: str) -> TrunkRefused:
    return TrunkRefused(
        RefusalReason.INVALID_REQUEST,
        f"the trunk cannot run layers {cuts.first} to {cuts.second - 1} by themselves: {why}. Give "
        "this client the run's own cut layers, model.first-cut and model.second-cut.",
    )
