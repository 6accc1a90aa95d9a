"""``flower-split export``: write a run's adapter, and say what was written."""

import argparse

from flower_split.results.client_adapter import one_client
from flower_split.results.export import describe_export, export_adapter
from flower_split.split import CutLayers


def export(arguments: argparse.Namespace) -> int:
    """Write a run's bottom, trunk and top as one PEFT adapter.

    Raises:
        FlowerSplitError: The run has no final adapters, or an option does not fit it.
    """
    cuts = CutLayers.parse(arguments.cuts) if arguments.cuts else None
    client = one_client(arguments.client, arguments.client_dir)
    out = export_adapter(arguments.run, arguments.out, cuts, client, base=arguments.base)
    print(describe_export(out))
    return 0
