"""Failpoints do nothing until they are switched on, and then exactly once."""

import errno

import pytest

from flower_split.errors import ConfigError
from flower_split.runtime import failpoints


def test_place_that_is_off_does_nothing():
    failpoints.reach("trunk.step.before")
    assert failpoints.fired() == set()


def test_place_fires_at_its_hit_and_once():
    failpoints.switch_on_from("trunk.step.before=raise@2, file.write.half=enospc")
    failpoints.reach("trunk.step.before")
    with pytest.raises(OSError, match="trunk.step.before"):
        failpoints.reach("trunk.step.before")
    failpoints.reach("trunk.step.before")
    with pytest.raises(OSError) as info:
        failpoints.reach("file.write.half")
    assert info.value.errno == errno.ENOSPC
    assert failpoints.fired() == {"trunk.step.before", "file.write.half"}


@pytest.mark.parametrize("text", ["nowhere=kill", "trunk.step.before=explode", "trunk.step.before"])
def test_unknown_place_or_action_is_refused(text):
    with pytest.raises(ConfigError, match="a failpoint is one of"):
        failpoints.switch_on_from(text)
