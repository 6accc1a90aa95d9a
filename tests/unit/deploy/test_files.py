"""Docker, compose, systemd and Kubernetes files: their commands parse, and what they refer to is there."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml
from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

from flower_split.cli.main import make_parser
from tests.support.documentation import ROOT

DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yml").read_text())
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
KUBERNETES = list(yaml.safe_load_all((DEPLOY / "kubernetes" / "trunk.yaml").read_text()))


def check_command(words: Iterable[str]) -> None:
    """Parse a command as its program does; it exits where an option is none."""
    program, *options = words
    name = Path(program).name
    if name == "flower-split" and options[0] == "supernode":
        _parse_args_run_supernode().parse_args(options[1:])
    elif name == "flower-split":
        if options != ["--help"]:
            make_parser().parse_args(options)
    elif name == "flower-superlink":
        _parse_args_run_superlink().parse_args(options)
    else:
        pytest.fail(f"{program} is not known here")


def docker_lists() -> list[list[str]]:
    """The JSON lists of CMD and HEALTHCHECK, continued lines joined."""
    text = DOCKERFILE.replace("\\\n", " ")
    return [json.loads(found) for found in re.findall(r"CMD (\[.*\])", text)]


# ---------------------------------------------------------------- docker


def test_dockerfile_commands_parse_and_it_runs_as_a_user_of_its_own() -> None:
    assert len(docker_lists()) == 3
    for words in docker_lists():
        check_command(words)
    lines = DOCKERFILE.splitlines()
    assert all(
        line.split()[1].endswith("-slim") for line in lines if line.startswith("FROM python")
    )
    users = [line.split()[1] for line in lines if line.startswith("USER")]
    assert users == ["10001:10001"]  # inherited by the trunk's stage
    assert "HEALTHCHECK" in DOCKERFILE.partition("AS trunk")[2]
    stages = set(re.findall(r"^FROM \S+ AS (\w+)$", DOCKERFILE, re.MULTILINE))
    for service in COMPOSE["services"].values():
        assert "build" not in service or service["build"]["target"] in stages


def test_what_the_dockerfile_copies_is_in_the_repository() -> None:
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
    assert copied
    for sources in copied:
        assert all((ROOT / source).exists() for source in sources.split())


# ---------------------------------------------------------------- compose


def test_compose_commands_parse_and_volumes_and_services_are_declared() -> None:
    services, volumes = COMPOSE["services"], COMPOSE["volumes"]
    assert services.keys() == {
        *("certificates", "trunk", "superlink", "node0", "node1", "prometheus", "grafana")
    }
    for name, service in services.items():
        if "command" in service and name != "certificates":
            check_command(service["command"])
        for mount in service.get("volumes", []):
            source = mount.rpartition("}")[0] or mount.partition(":")[0]
            assert source.startswith(("${", "./")) or source in volumes, mount
            if source.startswith("./"):
                assert (DEPLOY / source).exists()
        assert service.get("depends_on", {}).keys() <= services.keys()
    check_command(shlex.split(services["certificates"]["command"][2].partition("||")[2]))


def test_compose_names_hosts_that_the_certificate_is_for() -> None:
    made = make_parser().parse_args(
        shlex.split(COMPOSE["services"]["certificates"]["command"][2].partition("||")[2])[1:]
    )
    nodes = [service for name, service in COMPOSE["services"].items() if name.startswith("node")]
    partitions = set()
    for node in nodes:
        options = _parse_args_run_supernode().parse_args(node["command"][2:])
        assert options.superlink.partition(":")[0] in made.host
        partitions.add(options.node_config)
    assert "trunk" in made.host and len(partitions) == len(nodes) == 2


def test_prometheus_of_compose_asks_the_trunks_metrics_port() -> None:
    settings = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    trunk = next(words for words in docker_lists() if "trunk" in words)
    listen = make_parser().parse_args(trunk[1:]).metrics_listen
    [target] = settings["scrape_configs"][0]["static_configs"][0]["targets"]
    host, _, port = target.partition(":")
    assert host in COMPOSE["services"] and listen.endswith(f":{port}")


def test_probes_need_no_certificate_and_ask_the_port_that_the_trunk_opens_for_them() -> None:
    health, trunk = (
        next(words[1:] for words in docker_lists() if words[1] == name)
        for name in ("health", "trunk")
    )
    assert make_parser().parse_args(trunk).health_listen == make_parser().parse_args(health).address
    [container] = next(d for d in KUBERNETES if d["kind"] == "Deployment")["spec"]["template"][
        "spec"
    ]["containers"]
    listen = make_parser().parse_args(container["args"][1:]).health_listen
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = make_parser().parse_args(container[probe]["exec"]["command"][1:])
        assert (asked.address, asked.root_certificates) == (listen, "")


# ---------------------------------------------------------------- systemd


def sections(unit: Path) -> dict[str, list[str]]:
    """Key -> its values, of all sections: a key may stand several times."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_unit_starts_a_command_that_parses_again_and_again_and_keeps_secrets(unit: Path) -> None:
    found = sections(unit)
    [command] = found["ExecStart"]
    check_command(shlex.split(command))
    assert found["Restart"] == ["always"] and found["UMask"] == ["0077"]
    assert found["StateDirectory"] and found["User"] == ["flower-split"]
    loaded = {value.partition(":")[0] for value in found["LoadCredential"]}
    assert set(re.findall(r"%d/([\w.]+)", command)) <= loaded


def test_units_wait_for_the_trunk_to_be_ready_and_for_flower_to_forget_a_killed_node() -> None:
    trunk = sections(DEPLOY / "systemd" / "flower-split-trunk.service")
    assert trunk["Type"] == ["notify"]
    node = sections(DEPLOY / "systemd" / "flower-supernode.service")
    assert node["RestartSec"] == ["65"] and node["StartLimitIntervalSec"] == ["0"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_analyze_finds_nothing(unit: Path, tmp_path: Path) -> None:
    text = re.sub(r"/opt/flower-split/bin/\S+", sys.executable, unit.read_text(), count=1)
    text = text.replace("EnvironmentFile=/etc", "EnvironmentFile=-/etc")
    (tmp_path / unit.name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / unit.name)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    ours = [line for line in done.stderr.splitlines() if unit.name in line]
    assert not ours, done.stderr


# ---------------------------------------------------------------- Kubernetes


def of_kind(kind: str) -> dict[str, object]:
    [found] = [item for item in KUBERNETES if item["kind"] == kind]
    return dict(found)


def test_kubernetes_objects_are_of_known_kinds_in_one_namespace() -> None:
    versions = {item["kind"]: item["apiVersion"] for item in KUBERNETES}
    assert versions == {
        "Certificate": "cert-manager.io/v1",
        "PersistentVolumeClaim": "v1",
        "Deployment": "apps/v1",
        "Service": "v1",
    }
    assert {item["metadata"]["namespace"] for item in KUBERNETES} == {"flower-split"}


def test_kubernetes_trunk_is_one_pod_with_commands_probes_and_volumes_that_fit() -> None:
    spec = of_kind("Deployment")["spec"]
    assert spec["replicas"] == 1 and spec["strategy"] == {"type": "Recreate"}
    template = spec["template"]
    assert spec["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    pod, [container] = template["spec"], template["spec"]["containers"]
    check_command(container["args"])
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        check_command(container[probe]["exec"]["command"])
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    for volume in pod["volumes"]:
        if "secret" in volume:
            assert volume["secret"]["defaultMode"] == 0o440  # what the trunk takes


def test_kubernetes_service_claim_and_certificate_are_the_deployments() -> None:
    template = of_kind("Deployment")["spec"]["template"]
    [container] = template["spec"]["containers"]
    service = of_kind("Service")["spec"]
    assert service["selector"].items() <= template["metadata"]["labels"].items()
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert {port["targetPort"] for port in service["ports"]} <= ports.keys()
    volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
    claim = of_kind("PersistentVolumeClaim")["metadata"]["name"]
    assert volumes["state"]["persistentVolumeClaim"]["claimName"] == claim
    certificate = of_kind("Certificate")["spec"]
    assert volumes["certificates"]["secret"]["secretName"] == certificate["secretName"]
    probed = container["livenessProbe"]["exec"]["command"][2].partition(":")[0]
    assert probed == "127.0.0.1" and "localhost" in certificate["dnsNames"]  # --health-listen's
