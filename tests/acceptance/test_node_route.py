"""Nodes that see the trunk under another address, behind a proxy of their own."""

from pathlib import Path

import pytest

from flower_split.client.node_route import NodeRoute
from flower_split.config import TrunkConfig, parse_run_config
from flower_split.errors import ConfigError
from flower_split.messages.orders import TrunkOrder
from flower_split.runs.directory import RunDirectory
from flower_split.server.app import run
from flower_split.trunk.serve import RunningTrunk, Serving
from tests.support.certificates import Authority
from tests.support.connect_proxy import connect_proxy
from tests.support.local_grid import LocalGrid
from tests.support.tiny_app import make_data, make_model, tiny_config

TOKEN = "a coordinator token of the tests"


def test_a_run_whose_nodes_reach_the_trunk_by_an_address_and_a_proxy_of_their_own(
    tmp_path: Path,
) -> None:
    ca = Authority.made(tmp_path / "ca")
    certificate, key = ca.sign(names=["trunk.example"])
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    config = tiny_config(
        make_model(tmp_path / "model"),
        make_data(tmp_path / "data", 2),
        trunk__step_every="server-round",
    )
    serving = Serving(token=TOKEN, tls_certificate=certificate, tls_key=key)
    with (
        RunningTrunk(parse_run_config(config), serving) as trunk,
        connect_proxy(trunk.port) as proxy,
    ):
        config |= {
            "trunk.address": f"127.0.0.1:{trunk.port}",  # as the ServerApp sees it
            "trunk.token-file": str(token),
            "trunk.root-certificates": ca.root,
            "run-dir": str(tmp_path / "run"),
        }
        grid = LocalGrid(2, config)
        for context in grid.contexts.values():
            context.node_config |= {
                "trunk-address": "trunk.example:9500",
                "trunk-proxy": proxy.url,
            }
        run(grid, parse_run_config(config))
        # Two nodes evaluate, train and evaluate, each by a connection for calls and one for tensors.
        assert set(proxy.asked) == {"CONNECT trunk.example:9500 HTTP/1.1"}
        assert len(proxy.asked) >= 12
    assert len(RunDirectory.open(tmp_path / "run").metrics("step")) == 2


def test_route_is_the_node_configs_or_else_the_runs(caplog: pytest.LogCaptureFixture) -> None:
    order = TrunkOrder(address="trunk.example:9500", token="t", server_round=1)
    trunk = TrunkConfig(proxy="http://run:1")
    assert NodeRoute.of(trunk, {}).proxy == "http://run:1"
    assert NodeRoute.of(trunk, {}).address_of(order) == "trunk.example:9500"
    route = NodeRoute.of(trunk, {"trunk-address": "10.0.0.7:9501", "trunk-proxy": "none"})
    with caplog.at_level("INFO", logger="flower_split.client.node_route"):
        assert (route.proxy, route.address_of(order)) == ("none", "10.0.0.7:9501")
    assert "reached at 10.0.0.7:9501 (trunk-address of the node config)" in caplog.text


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("trunk-address", "trunk.example", "must be host:port"),
        ("trunk-address", "trunk.example:99999", "must be host:port"),
        ("trunk-address", 9500, "must be text"),
        ("trunk-proxy", "proxy.example:3128", "http://host:port"),
    ],
)
def test_route_of_a_wrong_node_config_is_refused(key: str, value: object, words: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} in this node's --node-config {words}|{words}"):
        NodeRoute.of(TrunkConfig(), {key: value})
