"""A sample of the fuzz in every run; ``python -m tests.hostile.fuzz`` makes the long ones."""

import pytest
import torch
import transformers

from tests.hostile.fuzz import FAMILIES, Findings, fuzz_calls, fuzz_codec

pytestmark = pytest.mark.filterwarnings("ignore")


def assert_nothing_found(findings: Findings) -> None:
    assert findings.internal == []
    assert findings.tracebacks == []
    assert findings.changed == []
    # The fuzz reaches the model, and is refused before it: neither is the whole of it.
    assert findings.statuses["Forward", "OK"] > 0
    assert findings.statuses["Forward", "INVALID_ARGUMENT"] > 0


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "t5"])
def test_no_call_of_a_participant_is_internal_or_changes_the_weights(family: str) -> None:
    transformers.utils.logging.set_verbosity(50)
    findings = Findings()
    fuzz_calls(family, 150, findings, seed=1)
    assert_nothing_found(findings)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_no_call_of_a_hundred_thousand_is_internal() -> None:
    torch.set_num_threads(1)
    findings = Findings()
    for seed, family in enumerate(FAMILIES):
        fuzz_calls(family, 12_500, findings, seed)
    assert_nothing_found(findings)


@pytest.mark.parametrize("count", [2_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_codec_knows_one_error(count: int) -> None:
    outcomes = fuzz_codec(count)
    ways = ("", "int8 ", "rows ")  # every message is read without a codec, and with two
    assert set(outcomes) == {way + kind for way in ways for kind in ("accepted", "CodecError")}
    assert outcomes.total() == len(ways) * count
