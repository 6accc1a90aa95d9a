"""Families beyond those that the package was built with: split alike, or refused, never wrong."""

from pathlib import Path

import pytest
import torch
import transformers

from flower_split.errors import SplitError
from flower_split.split import CutLayers, load_client_model, load_trunk_model, split_model
from flower_split.split.client_side.trunk_slot import IdentityTrunk
from tests.support.tiny_configs import tiny_config
from tests.support.tiny_models import loss_and_gradients, padded_batch
from tests.unit.split.coverage import (
    Row,
    check_families,
    families,
    markdown,
    read_markdown,
    summary,
)

# Each with something of its own: a mask per layer type, recurrent layers, latent attention,
# several streams of hidden states, encoder-style modules, cross attention, positions looked up per
# layer, adapters per language, shared blocks.
VARIED = (
    *("smollm3", "cohere2", "exaone4", "gpt_oss", "llama4_text"),
    *("ctrl", "openai-gpt", "jamba", "mamba2", "qwen3_next", "rwkv", "deepseek_v3", "deepseek_v4"),
    *("bert", "modernbert-decoder", "whisper", "roformer", "xmod", "zamba2", "gemma3"),
)
REFUSED = ("gemma3n_text", "hrm_text", "inkling2_text", "prophetnet", "xlm", "xlnet", "zaya")
# Their trunk layers are given token ids or embeddings that they do not look at. With the model in
# memory this shows; of a checkpoint neither party alone can tell.
REFUSED_WHEN_LOADING = ("deepseek_v4", "zamba2")
CUTS = CutLayers(1, 3)


@pytest.fixture(autouse=True)
def _silent() -> None:
    transformers.utils.logging.set_verbosity(50)


@pytest.mark.parametrize("family", VARIED)
def test_split_model_family_of_another_kind_matches_unsplit_bitwise(family: str) -> None:
    (row,) = check_families([family])
    assert row.outcome == "identical", row


@pytest.mark.parametrize("family", REFUSED)
def test_split_model_family_that_does_not_fit_is_refused(family: str) -> None:
    (row,) = check_families([family])
    assert row.outcome == "refused", row


def test_split_model_with_per_layer_embeddings_of_token_ids_is_refused() -> None:
    config = tiny_config("gemma4_text")
    torch.manual_seed(0)
    split_model(transformers.AutoModelForCausalLM.from_config(config), CUTS)
    config.hidden_size_per_layer_input = 8
    with pytest.raises(SplitError):
        split_model(transformers.AutoModelForCausalLM.from_config(config), CUTS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", REFUSED + REFUSED_WHEN_LOADING)
def test_loading_family_that_does_not_fit_is_refused(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(tiny_config(family)).save_pretrained(tmp_path)
    with pytest.raises(SplitError):
        load_trunk_model(str(tmp_path), CUTS)
        load_client_model(str(tmp_path), CUTS, IdentityTrunk())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", [name for name in VARIED if name not in REFUSED_WHEN_LOADING])
def test_loaded_family_of_another_kind_matches_the_whole_model(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(family)).train()
    model.save_pretrained(tmp_path)
    trunk = load_trunk_model(str(tmp_path), CUTS).train()
    client = load_client_model(str(tmp_path), CUTS, trunk).train()
    loss, gradients = loss_and_gradients(model, padded_batch())
    split_loss, split_gradients = loss_and_gradients(client, padded_batch(), trunk)
    assert torch.equal(loss, split_loss)
    for name, value in gradients.items():
        assert (value is None) == (split_gradients[name] is None)
        assert value is None or torch.equal(value, split_gradients[name]), name


@pytest.mark.parametrize("family", ["bart", "biogpt", "xglm"])
def test_split_model_whose_prologue_drops_out_draws_the_same_numbers(family: str) -> None:
    config = tiny_config(family)
    for name in ("dropout", "hidden_dropout_prob", "attention_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.2)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    client, trunk = split_model(model, CUTS)
    losses = []
    for module in (model, client, model):
        torch.manual_seed(8)
        losses.append(module(**padded_batch()).loss)
    assert torch.equal(losses[0], losses[2])
    assert torch.equal(losses[0], losses[1])


@pytest.mark.parametrize("family", ["longcat_flash", "rwkv", "xlstm", "jamba", "llama"])
def test_client_in_evaluation_by_default_runs_whatever_cache_the_family_has(family: str) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(family)).eval()
    client, _ = split_model(model, CUTS)
    with torch.no_grad():
        expected = model(**padded_batch(), use_cache=False).logits
        torch.testing.assert_close(client(**padded_batch()).logits, expected)


def test_coverage_finds_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_split(model: torch.nn.Module, cuts: CutLayers) -> tuple[torch.nn.Module, ...]:
        client, trunk = split_model(model, cuts)
        for parameter in trunk.parameters():
            parameter.data.mul_(1.01)
        return client, trunk

    monkeypatch.setattr("tests.unit.split.coverage.split_model", wrong_split)
    (row,) = check_families(["llama"])
    assert row.outcome == "failed" and "differs by" in row.remark


def test_coverage_table_counts_and_puts_problems_first() -> None:
    rows = [
        Row("a", "identical", "x"),
        Row("b", "failed", "y"),
        Row("c", "not run", "z"),
        Row("d", "refused", "w | v"),
    ]
    assert summary(rows) == {
        "tried": 3,
        "identical": 1,
        "within tolerance": 0,
        "refused": 1,
        "failed": 1,
        "not run": 1,
    }
    table = markdown({"masked-lm": rows}).splitlines()
    assert "| Masked language models | 3 | 1 | 0 | 1 | 1 | 1 |" in table
    assert [line.split()[1] for line in table[-4:]] == ["c", "b", "d", "a"]
    read = read_markdown("\n".join(table))
    assert sorted(read["masked-lm"], key=lambda row: row.family) == rows


@pytest.mark.slow
def test_coverage_of_transformers_is_95_percent_and_nothing_is_wrong() -> None:
    rows = check_families(families())
    counts = summary(rows)
    assert counts["failed"] == 0, [row for row in rows if row.outcome == "failed"]
    assert counts["within tolerance"] == 0
    assert counts["tried"] >= 150
    assert counts["identical"] >= 0.95 * counts["tried"], counts


def test_split_model_whose_forward_notes_something_is_as_before_and_matches_unsplit() -> None:
    # In evaluation its router notes a capacity, which training goes by from then on.
    torch.manual_seed(0)
    config = tiny_config("nllb-moe")
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).train()
    before = {name: vars(part).get("expert_capacity") for name, part in model.named_modules()}
    split_model(model, CUTS)
    assert before == {n: vars(part).get("expert_capacity") for n, part in model.named_modules()}
    (row,) = check_families(["nllb-moe"], "seq2seq")
    assert row.outcome == "identical", row
