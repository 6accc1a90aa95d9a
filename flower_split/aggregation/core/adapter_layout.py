"""A whole adapter's state dict as LoRA modules and other tensors, and back.

Names are those of an adapter's state: ``<module>.lora_A.weight`` and ``<module>.lora_B.weight``.
Two of PEFT's layers are written so that every module obeys ΔW = scale · B @ A with B starting at
0: an embedding's ``lora_embedding_A`` / ``_B`` change places, transposed, and a convolution's
kernels are flattened.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from flower_split.aggregation.core.factors import Factors
from flower_split.errors import AggregationError

PLAIN = (".lora_A.weight", ".lora_B.weight")
EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")
BIAS = ".lora_B.bias"
MAGNITUDE = ".lora_magnitude_vector"  # of DoRA


@dataclass(frozen=True, slots=True)
class Layout:
    """Which tensors of an adapter make up which module.

    Args:
        modules: Module name → the suffixes of its two factors, in sorted order of names.
        others: Names of the tensors that belong to no pair, sorted.
        shapes: Shape of every tensor in the reference adapter.
    """

    modules: Mapping[str, tuple[str, str]]
    others: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)

    def held(self, modules: frozenset[str] | None, who: str) -> "Layout":
        """Return the part of the layout that a client with these modules holds; None: all of it.

        What else belongs to a module (its bias, the bias of B, a magnitude) goes with it; tensors
        that belong to no module are everybody's.

        Args:
            modules: Names of modules.
            who: The subject of the error's sentence.

        Raises:
            AggregationError: A module is none of this adapter's.
        """
        if modules is None:
            return self
        unknown = sorted(modules - self.modules.keys())
        if unknown:
            raise AggregationError(
                f"{who} holds {', '.join(unknown[:4])}, which the initial adapter does not have; "
                "it must cover the modules of every client."
            )
        gone = tuple(module + "." for module in self.modules.keys() - modules)
        left = {name for name in self.shapes if gone and name.startswith(gone)}
        return Layout(
            {module: self.modules[module] for module in self.modules if module in modules},
            tuple(name for name in self.others if name not in left),
            {name: shape for name, shape in self.shapes.items() if name not in left},
        )


def layout_of(adapter: Mapping[str, Tensor]) -> Layout:
    """Find the pairs.

    Raises:
        AggregationError: One factor of a pair is missing.
    """
    modules: dict[str, tuple[str, str]] = {}
    others: list[str] = []
    for name in sorted(adapter):
        for suffixes in (PLAIN, EMBEDDING):
            for suffix, partner in (suffixes, suffixes[::-1]):
                if name.endswith(suffix):
                    module = name.removesuffix(suffix)
                    if module + partner not in adapter:
                        raise AggregationError(
                            f"the adapter has {name} but not {module + partner}; a LoRA module "
                            "needs both factors."
                        )
                    modules[module] = suffixes
                    break
            else:
                continue
            break
        else:
            others.append(name)
    shapes = {name: tuple(tensor.shape) for name, tensor in adapter.items()}
    return Layout(dict(sorted(modules.items())), tuple(others), shapes)


def factors_from(
    adapter: Mapping[str, Tensor], module: str, suffixes: tuple[str, str], scale: float
) -> Factors:
    """Return the factors of one module of an adapter.

    Raises:
        AggregationError: A tensor is not of the dimensions that its layer has.
    """
    a, b = (adapter[module + suffix] for suffix in suffixes)
    if suffixes == EMBEDDING:
        return Factors(b.T.contiguous(), a.T.contiguous(), scale)
    if a.dim() < 2 or b.dim() < 2:
        raise AggregationError(
            f"{module} has LoRA factors of shapes {list(a.shape)} and {list(b.shape)}; A must be "
            "[r, in] and B [out, r]."
        )
    return Factors(a.flatten(1), b.flatten(1), scale)


def factors_into(adapter: dict[str, Tensor], module: str, layout: Layout, factors: Factors) -> None:
    """Write factors under the names and in the shapes of the reference adapter."""
    suffixes = layout.modules[module]
    name_a, name_b = (module + suffix for suffix in suffixes)
    if suffixes == EMBEDDING:
        adapter[name_a], adapter[name_b] = factors.B.T.contiguous(), factors.A.T.contiguous()
        return
    kernel_a, kernel_b = layout.shapes[name_a][1:], layout.shapes[name_b][2:]
    adapter[name_a] = factors.A.reshape(factors.rank, *kernel_a)
    adapter[name_b] = factors.B.reshape(factors.out_features, factors.rank, *kernel_b)


def check_names(found: Iterable[str], expected: Iterable[str], who: str) -> None:
    """Refuse an adapter with other names than expected.

    Raises:
        AggregationError: Names are missing or unexpected; some are listed.
    """
    have, want = set(found), set(expected)
    problems = [
        f"{label} {', '.join(sorted(names)[:4])}{' …' if len(names) > 4 else ''}"
        for label, names in (("lacks", want - have), ("has unexpected", have - want))
        if names
    ]
    if problems:
        raise AggregationError(
            f"{who} {' and '.join(problems)}; a client returns exactly what it was sent."
        )
