"""A loop of one's own through a running trunk: what it does is kept, or taken back, as a whole."""

import doctest
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flower_split.client.remote_trunk import RemoteTrunk
from flower_split.errors import ConfigError, RoundAborted, TrunkRefused
from flower_split.integrations import trunk_round as module
from flower_split.integrations.trunk_round import trunk_round
from flower_split.split import set_trunk
from tests.acceptance.federation import (
    SGD,
    TOKEN,
    Federation,
    Whole,
    federation,
    make_batch,
    make_config,
    write_checkpoint,
)

BATCH = make_batch(2, (6, 4), seed=1)
LABELS = int((BATCH["labels"][:, 1:] != -100).sum())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def served(checkpoint: Path) -> Iterator[Federation]:
    with federation(make_config(checkpoint)) as made:
        yield made


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.touch(mode=0o600)
    path.write_text(TOKEN + "\n")
    return path


def step(model: nn.Module, trunk: RemoteTrunk, window: int) -> None:
    """One backward, which steps the trunk."""
    set_trunk(model, trunk)
    with trunk.micro_batch(window, 0, num_tokens=LABELS, loss_denominator=LABELS, last=True):
        logits = model(BATCH["input_ids"], attention_mask=BATCH["attention_mask"]).logits
    loss = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), BATCH["labels"][:, 1:].flatten(), reduction="sum"
    )
    (loss / LABELS).backward()


def adapter(served: Federation) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in served.coordinator.get_adapter().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_a_block_that_ends_commits_the_trunks_step_of_the_unsplit_model(
    served: Federation, token_file: Path
) -> None:
    before, model = adapter(served), served.client_model(0)
    with trunk_round(served.address, token_file, served.config, steps=1) as trunk:
        step(model, trunk, 0)
    assert served.coordinator.status().phase == "idle"
    whole = Whole(served.config)
    expected = whole.sgd_step([BATCH], SGD.learning_rate)
    found = adapter(served)
    assert not same(before, found)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def test_a_block_that_raises_takes_back_what_it_did_and_may_be_tried_again(
    served: Federation, token_file: Path
) -> None:
    before, model = adapter(served), served.client_model(0)
    with pytest.raises(ZeroDivisionError):
        with trunk_round(served.address, token_file, served.config, steps=2) as trunk:
            step(model, trunk, 0)
            raise ZeroDivisionError("of the loop")
    status = served.coordinator.status()
    assert same(before, adapter(served)) and status.phase == "aborted"
    assert "the loop ended with ZeroDivisionError: of the loop" in status.problem
    with trunk_round(served.address, token_file, served.config, steps=1) as trunk:
        step(model, trunk, 0)
    assert served.coordinator.status().attempt == 1 and not same(before, adapter(served))


def test_rounds_go_on_from_each_other_and_in_no_other_order(
    served: Federation, token_file: Path
) -> None:
    model, where = served.client_model(0), (served.address, token_file, served.config)
    with pytest.raises(
        TrunkRefused, match="goes on from round 1, and the trunk .*has no round yet"
    ):
        with trunk_round(*where, steps=1, server_round=2):
            pass
    for server_round in (1, 2):
        with trunk_round(*where, steps=1, server_round=server_round) as trunk:
            step(model, trunk, 0)
    assert served.engine.status().version == 2
    for again in (1, 2, 4):
        with pytest.raises(TrunkRefused, match=r"stands at round 2 \(idle\) of experiment 'loop'"):
            with trunk_round(*where, steps=1, server_round=again):
                pass
    with trunk_round(*where, steps=1, server_round=3) as trunk:
        step(model, trunk, 0)
    assert served.engine.status().version == 3
    with trunk_round(*where, steps=1, experiment="another") as trunk:  # from the initial weights
        step(model, trunk, 0)
    assert served.engine.status().version == 1


def test_a_loop_that_takes_fewer_steps_says_so_or_loses_them(
    served: Federation, token_file: Path
) -> None:
    before, model = adapter(served), served.client_model(0)
    with pytest.raises(RoundAborted):
        with trunk_round(served.address, token_file, served.config, steps=2) as trunk:
            step(model, trunk, 0)
    assert same(before, adapter(served))
    with trunk_round(served.address, token_file, served.config, steps=2) as trunk:
        step(model, trunk, 0)
        trunk.shorten_plan(1)
    assert not same(before, adapter(served))


def test_a_token_file_that_others_can_read_is_refused(served: Federation, token_file: Path) -> None:
    token_file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        with trunk_round(served.address, token_file, served.config, steps=1):
            pass


def test_the_example_runs() -> None:
    failed, tried = doctest.testmod(module)
    assert failed == 0 and tried > 0
