"""Print a CycloneDX bill of materials of what is installed for flower-split: ``sbom.py [EXTRA ...]``.

Lists flower-split and every distribution that it needs here, directly or not, with version, package URL
and licence, as JSON in the form of CycloneDX 1.5 (https://cyclonedx.org/docs/1.5/json/). With names of
extras, such as ``metrics``, theirs too. ``--licences`` prints a line for each instead.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = "flower-split"
_CLASSIFIER = "License :: OSI Approved :: "
_LONGEST = 80  # characters of a licence's name; a longer field is its whole text


def closure(extras: Sequence[str]) -> dict[str, metadata.Distribution]:
    """Return everything that flower-split needs here, itself included, by normalised name.

    Raises:
        SystemExit: Something that it needs is not installed.
    """
    found: dict[str, metadata.Distribution] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(ROOT, extra) for extra in ("", *extras)]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            raise SystemExit(f"{name} is needed and not installed: pip install -e .") from None
        waiting += needs(found[name], extra)
    return dict(sorted(found.items()))


def needs(found: metadata.Distribution, extra: str) -> Iterator[tuple[str, str]]:
    """Return what a distribution needs on this machine, as names with the extras wanted of them."""
    for line in found.requires or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            name = canonicalize_name(requirement.name)
            yield name, ""
            yield from ((name, wanted) for wanted in requirement.extras)


def licence(found: metadata.Distribution) -> str:
    """Return what a distribution says of its licence; empty: nothing."""
    about = found.metadata
    expression = about.get("License-Expression") or ""
    classifiers = [
        line.removeprefix(_CLASSIFIER)
        for line in about.get_all("Classifier") or ()
        if line.startswith(_CLASSIFIER)
    ]
    named = (about.get("License") or "").strip()
    first_line = named.splitlines()[0].strip() if named else ""
    return expression or " OR ".join(classifiers) or first_line[:_LONGEST]


def bill(found: dict[str, metadata.Distribution]) -> dict[str, object]:
    """Return the bill of materials."""
    components = [
        {
            "type": "application" if name == ROOT else "library",
            "bom-ref": f"pkg:pypi/{name}@{item.version}",
            "name": name,
            "version": item.version,
            "purl": f"pkg:pypi/{name}@{item.version}",
            "licenses": [{"license": {"name": licence(item) or "not stated"}}],
        }
        for name, item in found.items()
    ]
    root = next(item for item in components if item["name"] == ROOT)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": root},
        "components": [item for item in components if item is not root],
    }


def main(arguments: Sequence[str]) -> int:
    """Print the bill, or the licences."""
    extras = [name for name in arguments if not name.startswith("-")]
    found = closure(extras)
    if "--licences" in arguments:
        width = max(map(len, found))
        for name, item in found.items():
            print(f"{name:<{width}}  {item.version:<16}  {licence(item) or 'not stated'}")
    else:
        print(json.dumps(bill(found), indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
