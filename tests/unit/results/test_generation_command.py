"""``flower-split generate``: what a run's model says, in process and over a trunk server."""

import io
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from flower_split.assets import resolve_model_path
from flower_split.cli.main import main
from flower_split.config import ModelConfig, RunConfig, TrunkConfig
from flower_split.errors import RunDirectoryError
from flower_split.lora import adapter_state, attach_lora, load_adapter_state
from flower_split.parties.parts import all_parts, model_cuts
from flower_split.protocol.values import RoundPlan
from flower_split.results.export import export_adapter
from flower_split.runs.directory import RunDirectory
from flower_split.runs.samples import read_samples
from flower_split.server.coordinator import TrunkCoordinator
from flower_split.trunk.serve import RunningTrunk, Serving

# PEFT asks the model for a property that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

TOKEN = "a token of more than sixteen characters"
PROMPT = "Return the number of"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory of a run whose adapters are far from zero."""
    path = tmp_path_factory.mktemp("generation") / "run"
    config = RunConfig(
        run_dir=str(path),
        model=ModelConfig(name="quickstart", first_cut=2, second_cut=6),
        trunk=TrunkConfig(call_timeout=30.0),
    )
    model = AutoModelForCausalLM.from_pretrained(resolve_model_path("quickstart"))
    attach_lora(model, model_cuts(config), all_parts(config), seed=0)
    generator = torch.Generator().manual_seed(1)
    state = {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in adapter_state(model).items()
    }
    directory = RunDirectory.create(config)
    layers = {name: int(name.split("layers.")[1].split(".")[0]) for name in state}
    trunk = {name: tensor for name, tensor in state.items() if 2 <= layers[name] < 6}
    directory.write_adapter("trunk", trunk)
    directory.write_adapter("client", {n: t for n, t in state.items() if n not in trunk})
    yield directory.path


def expected(run: Path, out: Path, *, tokens: int, text: str = PROMPT, **options: object) -> str:
    """What plain PEFT says with the exported adapter."""
    path = resolve_model_path("quickstart")
    tokenizer = AutoTokenizer.from_pretrained(path)
    plain = AutoModelForCausalLM.from_pretrained(path)
    model = PeftModel.from_pretrained(plain, str(export_adapter(run, out))).eval()
    inputs = tokenizer(text, return_tensors="pt")
    torch.manual_seed(0)
    found = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=tokens,
        pad_token_id=tokenizer.pad_token_id,
        **{"do_sample": False, **options},
    )
    new = found[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["generate", *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ([], {}),
        (["--num-beams", "3"], {"num_beams": 3}),
        (
            ["--temperature", "1.3", "--top-p", "0.9"],
            {"do_sample": True, "temperature": 1.3, "top_p": 0.9},
        ),
    ],
)
def test_generate_says_what_the_exported_adapter_says(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    options: dict[str, object],
) -> None:
    found = said(capsys, str(run), "--prompt", PROMPT, "--max-new-tokens", "24", *flags)
    text = expected(run, tmp_path / "out", tokens=24, **options)
    assert found.strip() == text.strip() != ""


def test_generate_reads_prompts_until_the_input_ends(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("def main(\n\nclass A\n"))
    found = said(capsys, str(run), "--max-new-tokens", "8")
    texts = [
        expected(run, tmp_path / text, tokens=8, text=text) for text in ("def main(", "class A")
    ]
    assert found == "".join(text + "\n" for text in texts)


def test_samples_are_the_base_models_words_and_the_runs_and_stay_with_the_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, prompts = tmp_path / "prompts.txt", [PROMPT, "class A"]
    file.write_text(f"{PROMPT}\n\nclass A\n")
    found = said(capsys, str(run), "--samples", str(file), "--max-new-tokens", "24")
    path = resolve_model_path("quickstart")
    tokenizer, plain = (
        AutoTokenizer.from_pretrained(path),
        AutoModelForCausalLM.from_pretrained(path),
    )
    samples = read_samples(run)
    assert [sample.prompt for sample in samples] == prompts
    for sample in samples:
        inputs = tokenizer(sample.prompt, return_tensors="pt")
        tokens = plain.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=24,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = tokens[0, inputs["input_ids"].shape[1] :]
        assert sample.base == tokenizer.decode(new, skip_special_tokens=True)
        text = expected(run, tmp_path / sample.prompt, tokens=24, text=sample.prompt)
        assert sample.trained == text
        assert f"prompt:  {sample.prompt}\nbase:    {sample.base}\n" in found
    assert any(sample.trained != sample.base for sample in samples)
    (run / "samples.json").write_text('{"samples": [{"prompt": "x"}]}')
    with pytest.raises(RunDirectoryError, match="a list of samples with prompt, base, trained"):
        read_samples(run)
    (run / "samples.json").unlink()
    assert read_samples(run) == []
    for wrong, message in (
        ([str(tmp_path / "none.txt")], "cannot be read"),
        ([str(file), "--prompt", "x"], "--prompt has no meaning beside it"),
    ):
        assert main(["generate", str(run), "--samples", *wrong]) == 2
        assert message in capsys.readouterr().err


def test_generate_over_a_trunk_server_says_the_same(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, file = RunDirectory.open(run).config, tmp_path / "token"
    file.write_text(TOKEN)
    file.chmod(0o600)
    flags = ["--prompt", PROMPT, "--max-new-tokens", "24"]
    threads = torch.get_num_threads()
    try:
        with RunningTrunk(config, Serving(token=TOKEN)) as trunk:
            remote = ["--trunk-address", f"127.0.0.1:{trunk.port}", "--token-file", str(file)]
            assert main(["generate", str(run), *flags, *remote]) == 1  # other weights
            assert "does not hold the trunk weights" in capsys.readouterr().err
            load_adapter_state(
                trunk.engine.compute.trunk, RunDirectory.open(run).read_adapter("trunk")
            )
            over_grpc = said(capsys, str(run), *flags, *remote)
            assert trunk.engine.cache_bytes() == 0
            with closing(TrunkCoordinator(f"127.0.0.1:{trunk.port}", TOKEN)) as coordinator:
                assert coordinator.status().phase == "idle"
                plan = RoundPlan(
                    experiment="other", server_round=1, attempt=0, participants={0: "t"}
                )
                coordinator.begin_round(replace(plan, participants={0: "somebody's token"}))
                assert main(["generate", str(run), *flags, *remote]) == 1
                assert "is at work on round 1" in capsys.readouterr().err
    finally:
        torch.set_num_threads(threads)
    assert over_grpc == said(capsys, str(run), *flags)


def test_generate_names_what_is_wrong(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, words in (
        ([str(tmp_path / "none"), "--prompt", "x"], "none"),
        ([str(run), "--prompt", "x", "--temperature", "-1"], "--temperature"),
        ([str(run), "--prompt", "x", "--trunk-address", "127.0.0.1:1"], "--token-file"),
    ):
        assert main(["generate", *arguments]) != 0
        assert words in capsys.readouterr().err


def test_generate_chat_remembers_the_conversation(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[dict[str, str]]] = []
    template = PreTrainedTokenizerBase.apply_chat_template

    def noted(self: object, messages: list[dict[str, str]], **options: object) -> object:
        seen.append(messages)
        return template(self, messages, **options)

    monkeypatch.setattr(PreTrainedTokenizerBase, "apply_chat_template", noted)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    first = said(capsys, str(run), "--chat", "--max-new-tokens", "6").split("\n")[0]
    assert [message["role"] for message in seen[1]] == ["user", "assistant", "user"]
    assert [message["content"] for message in seen[1]][::2] == ["one", "two"]
    assert first == seen[1][1]["content"].split("\n")[0]
