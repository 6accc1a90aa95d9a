"""Notes on the clients' data: what each left out of it, and who takes no part for having too little."""

from collections.abc import Mapping

from flower_split.data import DataCounts
from flower_split.messages.client_facts import ClientFacts
from flower_split.server.federation.nodes import Federation


def data_notes(federation: Federation, facts: Mapping[int, ClientFacts]) -> list[str]:
    """Return one sentence for each client that left something of its data out; for log and report.

    Args:
        federation: Its ``left_out`` are the clients without a part in the run.
        facts: Partition to what each of the others said of itself.
    """
    notes = [
        f"Partition {partition_id} takes no part in this run (data.on-small-client = skip): {reason}"
        for partition_id, reason in sorted(federation.left_out.items())
    ]
    for partition_id, item in sorted(facts.items()):
        losses = DataCounts.from_mapping(item.data_counts).losses()
        if losses:
            notes.append(f"Partition {partition_id}: {'; '.join(losses)}.")
    return notes
