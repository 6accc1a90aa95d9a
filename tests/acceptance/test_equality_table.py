"""The table of ``python simulations/equality.py``: what it measures, and that the docs show it."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
CONCEPTS = (ROOT / "docs" / "concepts.md").read_text()


@pytest.fixture(scope="module")
def equality() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("equality", ROOT / "simulations" / "equality.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["equality"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["equality"]


@pytest.fixture(scope="module")
def one_step(
    equality: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, float]]:
    """Setting → distances of the clients and of the trunk, after one step."""
    model = equality.write_model(tmp_path_factory.mktemp("model"))
    models = equality.Models(equality.run_config(equality.SETTINGS[0], model, steps=1))
    return {s.name: equality.measure(s, models, 1) for s in equality.SETTINGS}


def test_one_step_is_the_central_step_exactly_where_the_theorem_says_so(
    one_step: dict[str, dict[str, float]],
) -> None:
    equal = {name for name, found in one_step.items() if max(found.values()) < 1e-5}
    assert equal == {
        "SGD, no clipping, `fedit`",
        "SGD, no clipping, `product-delta`, from B = 0",
        "AdamW, clipping over the model, `train.sync = gradients`",
    }


def test_the_page_on_concepts_shows_the_table_of_one_step(
    equality: ModuleType, one_step: dict[str, dict[str, float]]
) -> None:
    for name, found in one_step.items():
        cells = " | ".join(equality.in_words(distance) for distance in found.values())
        assert f"| {name} | {cells} |" in CONCEPTS


@pytest.mark.slow
def test_the_page_on_concepts_shows_the_table_as_it_is_printed(
    equality: ModuleType, tmp_path: Path
) -> None:
    assert equality.table(equality.write_model(tmp_path / "model")) in CONCEPTS
