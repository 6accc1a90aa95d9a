"""The base model and where it is cut."""

from dataclasses import dataclass

from flower_split.config.rules import at_least, one_of
from flower_split.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The base model and where it is cut."""

    name: str = "quickstart"  # "quickstart" (in the package), a local directory, or a hub id
    revision: str = ""  # hub revision; empty: the default branch
    first_cut: int = 2  # the bottom is layers [0, first_cut)
    second_cut: int = 6  # the trunk is layers [first_cut, second_cut); the top is the rest
    dtype: str = "float32"  # dtype of the base weights and of the activations
    attn_implementation: str = ""  # transformers' name; empty: the model's default

    def __post_init__(self) -> None:
        """Check the rules that need no model."""
        if not self.name:
            raise ConfigError("model.name must not be empty: a local directory or a hub id.")
        at_least("model.first-cut", self.first_cut, 0)
        if self.second_cut <= self.first_cut:
            raise ConfigError(
                "model.second-cut must be above model.first-cut, or the trunk has no layer; "
                f"they are {self.second_cut} and {self.first_cut}."
            )
        one_of("model.dtype", self.dtype, DTYPES)
