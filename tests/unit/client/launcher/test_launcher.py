"""A SuperNode's launcher: what Flower starts is forked there, and ends as Flower's own command would."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from flower_split.cli.parser import make_parser
from flower_split.client.launcher.supernode import environment_with, start_launcher

ECHO = "/bin/echo"  # in the place of Flower's own command: shows that a start was not taken
FLOWERS = str(Path(sys.executable).with_name("flwr-clientapp"))


class Rig:
    """A launcher, and the process that stands for its SuperNode."""

    def __init__(self, root: Path) -> None:
        self.installed = root / "site-packages"  # on the launcher's import path
        self.installed.mkdir()
        self.folder = root / ("a long path, " * 8) / "launcher"
        self.folder.mkdir(0o700, parents=True)
        self.node = subprocess.Popen(["cat"], stdin=subprocess.PIPE)  # ends with its input
        with pytest.MonkeyPatch.context() as patch:
            paths = [*filter(None, sys.path), str(self.installed)]
            patch.setenv("PYTHONPATH", os.pathsep.join(paths))
            self.launcher = start_launcher(self.folder, ECHO, self.node.pid)

    def run(self, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        """What Flower does for a message, with the SuperNode's PATH."""
        return subprocess.run(
            ["flwr-clientapp", *arguments],
            env=environment_with(self.folder, {**os.environ, **environment}),
            capture_output=True,
            text=True,
            timeout=60,
        )

    def end_node(self) -> None:
        assert self.node.stdin is not None
        self.node.stdin.close()
        self.node.wait(timeout=10)

    def close(self) -> None:
        if self.node.returncode is None:
            self.end_node()
        self.launcher.wait(timeout=20)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """One for the tests in their order: a launcher takes seconds to load Flower."""
    rig = Rig(tmp_path_factory.mktemp("rig"))
    try:
        yield rig
    finally:
        rig.close()


def test_forked_processes_say_and_end_as_flowers_own_also_at_once(rig: Rig) -> None:
    shown = {**os.environ, "COLUMNS": "133"}
    own = subprocess.run([FLOWERS, "--nonsense"], capture_output=True, env=shown)
    started = [
        subprocess.Popen(
            ["flwr-clientapp", argument],
            env=environment_with(rig.folder, shown),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for argument in ("--help", "--nonsense", "--help")
    ]
    said = [process.communicate(timeout=60) for process in started]
    assert [process.returncode for process in started] == [0, own.returncode, 0] == [0, 2, 0]
    assert said[1] == (own.stdout, own.stderr)
    assert said[0] == said[2]
    assert said[0][0].startswith(b"usage: flwr-clientapp")


def test_changed_installation_is_loaded_anew_by_flowers_own_command(rig: Rig) -> None:
    (rig.installed / "a_package.dist-info").mkdir()
    assert rig.run("--token", "x y").stdout == "--token x y\n"


def test_launcher_ends_with_its_supernode_and_leaves_nothing(rig: Rig) -> None:
    rig.end_node()
    assert rig.launcher.wait(timeout=20) == 0
    assert not rig.folder.exists()


def test_launcher_that_is_gone_is_done_without(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.launcher.kill()
    rig.launcher.wait(timeout=10)
    assert rig.run("--token", "x y").stdout == "--token x y\n"
    rig.close()


def test_environment_has_the_launchers_command_first_and_keeps_what_is_set(tmp_path: Path) -> None:
    given: Mapping[str, str] = {"PATH": "/usr/bin", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "3"}
    assert environment_with(tmp_path, given) == {
        "PATH": f"{tmp_path}:/usr/bin",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "3",
    }
    assert environment_with(tmp_path, {})["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"] == "0.2"


def test_command_hands_every_option_on_as_it_is() -> None:
    words = ["--insecure", "--node-config", "partition-id=0 num-partitions=2", "--help"]
    assert make_parser().parse_args(["supernode", *words]).arguments == words
