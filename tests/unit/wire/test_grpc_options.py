"""Options of gRPC that are promises: what a stranger may send, and how many may."""

import pytest

from flower_split.config import parse_run_config
from flower_split.errors import ConfigError
from flower_split.wire.grpc_options import server_options


def test_server_takes_no_more_than_its_bounds() -> None:
    options = dict(server_options(5, 1 << 20))
    assert options["grpc.max_allowed_incoming_connections"] == 5
    assert options["grpc.http2.lookahead_bytes"] == 1 << 20
    assert options["grpc.http2.bdp_probe"] == 0  # it would widen the window for whoever sends fast


@pytest.mark.parametrize("window", [0, 1 << 15, 1 << 30])
def test_window_that_is_none_is_refused(window: int) -> None:
    with pytest.raises(ConfigError, match=r"trunk\.stream-window must be 65536 to 16777216 bytes"):
        parse_run_config({"trunk.stream-window": window})
