"""A trunk behind an HTTP proxy that lets CONNECT through: which proxy, and calls through it."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

from flower_split.client.remote_trunk import RemoteTrunk
from flower_split.config import TrunkConfig
from flower_split.errors import ConfigError, TrunkError, TrunkUnavailable
from flower_split.server.coordinator import TrunkCoordinator
from flower_split.trunk.service.server import MutualTls
from flower_split.wire.grpc_health import health_of
from flower_split.wire.proxies import connect, proxy_to, without_credentials
from tests.support.certificates import Authority
from tests.support.connect_proxy import connect_proxy
from tests.support.loopback import COORDINATOR_TOKEN, FINGERPRINT, HIDDEN, FakeEngine, served

AWAY = "trunk.example:9500"  # a name that no resolver knows
VARIABLES = [f"{name}_proxy" for name in ("grpc", "https", "http", "all", "no")]


@pytest.fixture(autouse=True)
def no_proxy_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return Authority.made(tmp_path / "ca")


@pytest.fixture
def port(ca: Authority) -> Iterator[int]:
    certificate, key = ca.sign(names=["trunk.example"])
    with served(FakeEngine(), tls_certificate=certificate, tls_key=key) as port:
        yield port


def trunk(ca: Authority, proxy: str, timeout: float = 20.0, address: str = AWAY) -> RemoteTrunk:
    return RemoteTrunk(
        address,
        token="token-0",
        fingerprint=FINGERPRINT,
        mode="joint",
        call_timeout=timeout,
        root_certificates=ca.root,
        transport="auto",
        proxy=proxy,
    )


def test_calls_with_tensors_go_through_the_proxy_that_is_named(ca: Authority, port: int) -> None:
    hidden = torch.randn(2, 3, HIDDEN, generator=torch.Generator().manual_seed(0))
    with connect_proxy(port, user="us:secret") as proxy:
        with trunk(ca, proxy.url) as client, torch.no_grad():
            client.open(1, evaluate=True)
            assert torch.equal(client(hidden), 2 * hidden)
        assert set(proxy.asked) == {f"CONNECT {AWAY} HTTP/1.1"}


def test_status_and_health_go_through_the_proxy_of_the_environment(
    ca: Authority, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connect_proxy(port) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        link = TrunkCoordinator(AWAY, COORDINATOR_TOKEN, ca.root, timeout=20.0)
        assert link.status().epoch == 7
        link.close()
        assert health_of(AWAY, ca.root) == "SERVING"
        assert len(proxy.asked) == 2


def test_loopback_is_reached_without_the_proxy(ca: Authority, port: int) -> None:
    with connect_proxy(port, refuse="403 Forbidden") as proxy:
        with trunk(ca, proxy.url, address=f"127.0.0.1:{port}") as client:
            assert client.open(1).session
        assert proxy.asked == []


def test_a_proxy_that_refuses_is_named_without_its_password(ca: Authority, port: int) -> None:
    with (
        connect_proxy(port, user="us:secret", refuse="403 Forbidden") as proxy,
        trunk(ca, proxy.url, timeout=1.0) as client,
        pytest.raises(TrunkUnavailable) as caught,
    ):
        client.open(1)
    said = str(caught.value)
    assert f"through the proxy {proxy.url.rpartition('@')[2]}" in said and "trunk.proxy" in said
    assert "secret" not in said


def test_a_missing_certificate_is_found_out_through_the_proxy(ca: Authority) -> None:
    certificate, key = ca.sign(names=["trunk.example"])
    mutual = MutualTls(client_ca=ca.root)
    with (
        served(FakeEngine(), tls_certificate=certificate, tls_key=key, mutual=mutual) as port,
        connect_proxy(port) as proxy,
        trunk(ca, proxy.url) as client,
        pytest.raises(TrunkError, match="the trunk asks for a client certificate"),
    ):
        client.open(1)


@pytest.mark.parametrize(
    ("setting", "environment", "expected"),
    [
        ("environment", {}, ""),
        ("environment", {"https_proxy": "http://p:1"}, "http://p:1"),
        ("environment", {"HTTPS_PROXY": "p:1"}, "http://p:1"),
        ("environment", {"http_proxy": "http://p:1"}, "http://p:1"),
        ("environment", {"grpc_proxy": "http://g:2", "https_proxy": "http://p:1"}, "http://g:2"),
        ("environment", {"https_proxy": "http://p:1", "no_proxy": ".example"}, ""),
        ("none", {"https_proxy": "http://p:1"}, ""),
        ("http://q:3", {"https_proxy": "http://p:1"}, "http://q:3"),
        ("http://q:3", {"no_proxy": "trunk.example"}, ""),
    ],
)
def test_proxy_to_a_trunk_is_the_settings_or_the_environments(
    setting: str,
    environment: Mapping[str, str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert proxy_to(AWAY, setting) == expected


def test_a_proxy_that_is_none_is_refused_without_its_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for value in ("https://us:secret@p:1", "socks5://p:1", "http://p", "p:1", "http://p:1/path"):
        with pytest.raises(ConfigError, match='must be "environment", "none" or') as caught:
            TrunkConfig(proxy=value)
        assert "secret" not in str(caught.value)
    monkeypatch.setenv("https_proxy", "socks5://p:1")
    with pytest.raises(ConfigError, match='https_proxy of the environment .*trunk.proxy = "none"'):
        proxy_to(AWAY)


def test_connect_gives_up_on_a_proxy_that_refuses(port: int) -> None:
    with (
        connect_proxy(port, refuse="403 Forbidden") as proxy,
        pytest.raises(OSError, match="refused CONNECT: .*403"),
    ):
        connect(AWAY, proxy.url, 5.0)
    assert without_credentials("http://us:secret@p:1") == "p:1"
