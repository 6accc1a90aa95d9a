"""A prompt that is no UTF-8 is refused in words, before anything is loaded."""

import argparse
import os

import pytest

from flower_split.cli.generate import generate
from flower_split.errors import ConfigError


def test_prompt_that_is_no_utf8_is_refused():
    arguments = argparse.Namespace(prompt=os.fsdecode(b"caf\xe9"))
    with pytest.raises(ConfigError, match="--prompt must be UTF-8; character 3"):
        generate(arguments)
