"""A note where the machines of a run have different versions of this package."""

from collections.abc import Mapping

from flower_split.messages.client_facts import ClientFacts
from flower_split.runtime.version import __version__


def version_notes(facts: Mapping[int, ClientFacts], trunk_version: str) -> list[str]:
    """Return a sentence that names every version and who has it; nothing where there is one.

    Versions that cannot work together are refused before: their protocols or message formats differ.

    Args:
        facts: Partition to what each client said of itself.
        trunk_version: The trunk's; empty: it did not say.
    """
    parties = {
        "the ServerApp": __version__,
        "the trunk": trunk_version or "one that it does not tell",
    }
    parties |= {
        f"partition {partition_id}": item.package_version
        for partition_id, item in sorted(facts.items())
    }
    if len(set(parties.values())) == 1:
        return []
    named = [
        f"{version} ({', '.join(party for party, its in parties.items() if its == version)})"
        for version in dict.fromkeys(parties.values())
    ]
    return [f"This run's machines have different versions of flower-split: {'; '.join(named)}."]
