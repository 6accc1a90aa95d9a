import re

from flower_split.config import run_config_keys
from flower_split.config.reference import config_keys, config_reference


def test_every_key_is_described_once_in_one_line_with_its_default():
    described = {item.key: item.default for item in config_keys()}
    assert described == run_config_keys()
    assert len(config_keys()) == len(described)
    for item in config_keys():
        assert re.fullmatch(r"[^\n]+[.…]|[^\n]+, \.\.\.", item.meaning), item


def test_the_reference_has_a_table_per_section():
    text = config_reference()
    assert (
        "| `trunk.call-timeout` | float | `150.0` | Seconds that a client waits for one call"
        in text
    )
    assert "| `lora.top.use-dora` | bool | `false` |" in text
    assert '| `model.name` | str | `"quickstart"` |' in text
    assert text.startswith("## The run\n\n| key | type | default | meaning |\n")
    assert text.count("## `trunk.optimizer`") == 1
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == len(run_config_keys())
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows)
