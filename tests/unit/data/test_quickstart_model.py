"""The model in the package: small, complete, trained on code and not on documentation."""

import ast
import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from flower_split import assets
from flower_split.assets import resolve_model_path
from flower_split.config import ModelConfig
from flower_split.data import load_tokenizer
from flower_split.data.stdlib_docs import library_files
from flower_split.errors import ConfigError

SCRIPT = Path(__file__).parents[3] / "simulations" / "pretrain_quickstart.py"
SOURCE = '''"""Module documentation."""
# a comment in a run
# of two lines
import os  # short


class A:
    """Class documentation,

    of several lines.
    """

    x: int = 1
    """About x."""

    # alone and short
    def f(self):
        r"""Only documentation."""

    def g(self):  # a comment that is far too long to be company of code and says a great deal
        return "# no comment", \'\'\'not documentation\'\'\'


class B: "on the same line"
'''


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pretrain_quickstart", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(ModelConfig())


def test_quickstart_directory_is_complete_and_small() -> None:
    files = {
        path.name: path.stat().st_size for path in Path(resolve_model_path("quickstart")).iterdir()
    }
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(
        files
    )
    assert sum(files.values()) <= 5e6
    assert resolve_model_path("some/model") == "some/model"
    assert resolve_model_path("./quickstart") == "./quickstart"


def test_quickstart_absent_from_the_package_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(ConfigError, match="Install the package again"):
        resolve_model_path("quickstart")


def test_quickstart_tokenizer_loses_no_character(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "def f(x):\n\treturn 'naïve ✓ 漢字'  # \r\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert len(tokenizer) == 2048


def test_quickstart_model_knows_code_better_than_documentation(
    script: ModuleType, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = AutoModelForCausalLM.from_pretrained(resolve_model_path("quickstart"))
    assert model.dtype == torch.float32 and len(model.model.layers) == 8
    [path] = [path for path in library_files() if path.name == "argparse.py"]
    source = path.read_text()
    code = script.code_only(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    documentation = "\n".join(filter(None, map(ast.get_docstring, nodes)))

    def loss(text: str) -> float:
        ids = torch.tensor([tokenizer(text, verbose=False)["input_ids"][:512]])
        with torch.no_grad():
            return float(model(input_ids=ids, labels=ids).loss)

    assert loss(code) < loss(documentation) - 0.5
    assert loss(documentation) < math.log(2048) - 1  # far better than guessing


def test_code_only_takes_out_documentation_and_long_comments_alone(script: ModuleType) -> None:
    assert script.code_only(SOURCE) == (
        "import os  # short\n\n\nclass A:\n\n    x: int = 1\n\n    # alone and short\n"
        "    def f(self):\n        pass\n\n    def g(self):\n"
        "        return \"# no comment\", '''not documentation'''\n\n\n"
        'class B: "on the same line"\n'
    )
