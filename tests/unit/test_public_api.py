import doctest
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flower_split
import flower_split.testing.aggregators
import flower_split.testing.rules


@pytest.mark.parametrize("name", flower_split.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(flower_split, name).__name__ == name
    assert name in dir(flower_split)


def test_the_table_of_modules_and_all_agree() -> None:
    assert sorted(flower_split._MODULES) == sorted(flower_split.__all__)


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = "torch", "flwr", "grpc", "transformers", "peft"
    code = f"import sys, flower_split; print([m for m in {heavy!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_another_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'split_modle'"):
        flower_split.split_modle  # noqa: B018


@pytest.mark.parametrize(
    "module",
    [flower_split, flower_split.testing.aggregators, flower_split.testing.rules],
    ids=lambda module: module.__name__,
)
def test_the_examples_run(module: object) -> None:
    failed, tried = doctest.testmod(module)
    assert failed == 0 and tried > 0


@pytest.mark.parametrize("name", flower_split.__all__)
def test_every_public_name_has_an_example(name: str) -> None:
    examples = doctest.DocTestParser().get_examples(flower_split.__doc__ or "")
    used = [e.source for e in examples if "import" not in e.source]
    assert any(re.search(rf"\b{name}\b", source) for source in used)


def test_the_root_holds_errors_and_packages_only() -> None:
    root = Path(flower_split.__file__).parent
    assert [file.name for file in sorted(root.glob("*.py"))] == ["__init__.py", "errors.py"]
