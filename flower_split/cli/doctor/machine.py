"""The machine by itself: versions, accelerator, disks, shared memory, file limits."""

import importlib.util
import platform
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from flower_split.cli.doctor.findings import Finding, ok, problem, warning

_GIB = 1 << 30
_LEAST_FREE = _GIB  # bytes of a disk: below, a checkpoint may not fit
_SCARCE_FREE = 5 * _GIB
_LEAST_SHARED = _GIB // 4  # bytes of /dev/shm for Ray's object store
_LEAST_FILES, _SCARCE_FILES = 256, 4096  # open files of a process
_SHOWN = ("torch", "transformers", "peft", "flwr", "grpcio")


def versions(
    wanted: Iterable[str] | None = None, installed: Callable[[str], str] = version
) -> Finding:
    """Compare what is installed with what this package asks for.

    Args:
        wanted: Requirements; None: those of the installed package.
        installed: Returns a distribution's version; raises PackageNotFoundError where it has none.
    """
    subject = "versions"
    if wanted is None:
        try:
            wanted = requires("flower-split") or []
        except PackageNotFoundError:
            remedy = "Install it with pip, so that its requirements are known."
            return warning(subject, "flower-split is on the path, but not installed", remedy)
    wrong, shown = [], [f"Python {platform.python_version()}"]
    for requirement in map(Requirement, wanted):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = installed(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} is {found}, not {requirement.specifier}")
        elif requirement.name in _SHOWN:
            shown.append(f"{requirement.name} {found}")
    if wrong:
        return problem(subject, "; ".join(wrong), "Run: pip install --upgrade flower-split")
    return ok(subject, ", ".join(shown))


def accelerator(
    device: Path = Path("/dev/nvidiactl"), gpus: Callable[[], Iterable[str]] | None = None
) -> Finding:
    """Say which GPUs torch can use.

    Args:
        device: There where the machine has an NVIDIA driver.
        gpus: Returns their names; None: torch's.
    """
    subject = "accelerator"
    names = list((gpus or _gpus)())
    if names:
        return ok(subject, ", ".join(names))
    if device.exists():
        return warning(
            subject,
            f"{device} is there, but torch sees no GPU",
            "Install a torch that is built for this driver's CUDA, and look at nvidia-smi.",
        )
    return ok(subject, "none; models run on the CPU")


def _gpus() -> Iterator[str]:
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    for index in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(index).total_memory
        yield f"{torch.cuda.get_device_name(index)} ({memory / _GIB:.0f} GiB)"


def disks(places: Mapping[str, Path], free: Callable[[Path], int] | None = None) -> list[Finding]:
    """Say how much room is left, once for each disk.

    Args:
        places: What is written -> where.
        free: Returns the bytes that are left at a directory that exists; None: the system's answer.
    """
    names: dict[tuple[int, int], list[str]] = {}
    for name, place in places.items():
        there = next(
            path for path in (place.absolute(), *place.absolute().parents) if path.exists()
        )
        left = (free or (lambda path: shutil.disk_usage(path).free))(there)
        names.setdefault((there.stat().st_dev, left), []).append(f"{name} in {place}")
    return [_room(left, "; ".join(found)) for (_, left), found in names.items()]


def _room(left: int, what: str) -> Finding:
    text = f"{left / _GIB:.1f} GiB are free for {what}"
    remedy = "Free some, or name a directory on another disk (run-dir, FLWR_HOME, TMPDIR, HF_HOME)."
    if left < _LEAST_FREE:
        return problem("disk", text, remedy)
    return warning("disk", text, remedy) if left < _SCARCE_FREE else ok("disk", text)


def shared_memory(place: Path = Path("/dev/shm"), left: int | None = None) -> Finding:
    """Say how much shared memory Ray finds, which simulations run on.

    Args:
        place: Of the system.
        left: Free bytes; None: the system's answer.
    """
    subject = "shared memory"
    if left is None:
        if not place.is_dir():
            return ok(subject, f"no {place} here; Ray uses {tempfile.gettempdir()}")
        left = shutil.disk_usage(place).free
    text = f"{left / _GIB:.1f} GiB are free in {place}"
    if left < _LEAST_SHARED:
        remedy = "In a container, give it more: docker run --shm-size=1g. Only simulations need it."
        return warning(subject, text, remedy)
    return ok(subject, text)


def open_files(soft: int | None = None) -> Finding:
    """Say how many files a process may open; every connection is one.

    Args:
        soft: The limit; None: the system's.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if soft is None else soft
    subject = "open files"
    if limit == resource.RLIM_INFINITY:
        return ok(subject, "no limit")
    text = f"a process may open {limit}"
    remedy = "Raise it: ulimit -n 65536, or LimitNOFILE=65536 in a systemd unit."
    if limit < _LEAST_FILES:
        return problem(subject, text, remedy)
    return warning(subject, text, remedy) if limit < _SCARCE_FILES else ok(subject, text)
