"""FLoRIST: as many singular values as hold a share τ of the energy, one rank for everybody.

FLoRIST: Singular Value Thresholding for Efficient and Accurate Federated Fine-Tuning of Large
Language Models. Hariharan Ramesh, Jyotikrishna Dass. MLSys 2026, arXiv 2506.09199.

The mean ΔW is decomposed from the stacked factors; the global rank p is the smallest with
σ_1² + … + σ_p² ≥ τ Σ σ². Only p components travel down. A client whose rank is above p trains the
rest of its rank from fresh rows of A; one whose rank is below p gets the leading ones.
"""

from dataclasses import dataclass
from typing import ClassVar

from flower_split.aggregation.core.lowrank import Spectrum
from flower_split.aggregation.methods.flexlora import FlexLoRA
from flower_split.aggregation.methods.product_family import ProductAggregator
from flower_split.errors import AggregationError


@dataclass(frozen=True, kw_only=True, slots=True)
class FLoRIST(FlexLoRA):
    """FlexLoRA with the global rank chosen by energy.

    Args:
        tau: Share of the squared singular values to keep, in (0, 1]; the paper uses 0.8 to 0.99,
            and 1 keeps all of them.
    """

    name: ClassVar[str] = "florist"
    paper: ClassVar[str] = "2506.09199"
    exactness: ClassVar[str] = "to the share τ of the energy"
    deviation: ClassVar[str] = (
        "tau is 1 unless given, at which it is FlexLoRA (the paper uses 0.80 to 0.99); a "
        "client below the global rank gets its leading components, not all of them"
    )

    tau: float = 1.0

    def __post_init__(self) -> None:
        """Check the options; see :class:`Aggregator`."""
        ProductAggregator.__post_init__(self)
        if not 0 < self.tau <= 1:
            raise AggregationError(f"florist's tau must be in (0, 1]; it is {self.tau!r}.")

    def kept(self, spectrum: Spectrum) -> Spectrum:
        """Return the fewest leading components with a share ``tau`` of the energy."""
        if self.tau == 1 or spectrum.S.numel() == 0:
            return spectrum
        energy = spectrum.S.square().cumsum(0)
        return spectrum.top(1 + int((energy < self.tau * energy[-1]).sum()))
