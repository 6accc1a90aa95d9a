"""``flower-split bench``: what this machine does, beside a reference in the same run."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_PRESETS = ("tiny", "small", "1b", "7b")
_MODES = ("exact", "fast")


def add_bench(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command with its benchmarks."""
    bench = commands.add_parser(
        "bench",
        help="measure this machine, from the wire to a whole run",
        description="Prints medians, spreads and ratios to a reference that ran in the same run.",
    )
    kinds = bench.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    _add_transport(kinds)
    _add_step(kinds)
    _add_clients(kinds)
    _add_memory(kinds)
    _add_experiments(kinds)
    _add_aggregation(kinds)
    _add_quickstart(kinds)


def _add_transport(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    transport = kinds.add_parser(
        "transport",
        help="round trips to a trunk on loopback, beside raw TCP and memcpy; codecs",
        description="Calls of gRPC and of shared memory with a trunk that echoes, in turns with raw TCP "
        "and memcpy of the same bytes. A training call also digests its content. Then what the codecs "
        "take at one end of the wire, in turns with a copy. With --link, TCP and gRPC over a link of that "
        "rate, through a proxy in a process of its own.",
    )
    transport.add_argument(
        "--sizes", type=float, nargs="+", default=[0.39, 8.4, 67.0], metavar="MB"
    )
    transport.add_argument("--repeats", type=int, default=15, help="timed round trips per size")
    transport.add_argument(
        "--link", type=float, metavar="MBIT/S", help="each way; default: loopback"
    )
    transport.add_argument(
        "--round-trip",
        type=float,
        metavar="MS",
        help="of the link; default: 0, and with --link alone",
    )
    transport.add_argument(
        "--stream-window", type=int, default=1 << 17, metavar="BYTES", help="as trunk.stream-window"
    )
    _add_out(transport)
    transport.set_defaults(handler=_transport)


def _add_step(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    step = kinds.add_parser(
        "step",
        help="one training step: split, beside plain PEFT in one process",
        description="A trunk and its clients as processes of this machine, and as the reference "
        "transformers with PEFT in one process, eager, under autocast where the weights have 16 bits. "
        "7b needs a GPU of 80 GB.",
    )
    _add_model(step)
    step.add_argument("--compute", nargs="+", choices=_MODES, help="default: exact; on a GPU both")
    step.add_argument("--transport", nargs="+", default=["auto"], metavar="NAME")
    step.add_argument("--clients", type=int, nargs="+", default=[1], metavar="N")
    step.add_argument(
        "--rows", type=int, default=0, metavar="N", help="of each client; default: 8, divided"
    )
    step.add_argument("--accumulate", type=int, default=1, metavar="N", help="micro-batches a step")
    step.add_argument("--in-flight", type=int, default=2, metavar="N")
    step.add_argument("--threads", type=int, default=1, metavar="N", help="of each process")
    step.add_argument("--kv-heads", type=int, default=0, metavar="N", help="default: all heads")
    step.add_argument("--wire-dtype", default="native", metavar="NAME", help="of activations")
    step.add_argument("--gradient-wire-dtype", default="", metavar="NAME")
    step.add_argument("--window-batches", default="off", choices=("off", "on"))
    share = "trunk processes that share window batches, beside one; a GPU each"
    step.add_argument("--replicas", type=int, default=1, metavar="N", help=share)
    divide = "trunk processes that divide every layer, beside one; a GPU each"
    step.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help=divide)
    step.add_argument("--batch-positions", type=int, default=8192, metavar="N")
    step.add_argument("--activation-memory", type=float, default=60.0, metavar="GiB")
    step.add_argument("--compiled", action="store_true", help="the reference compiled as well")
    _add_out(step)
    step.set_defaults(handler=_step)


def _add_memory(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    memory = kinds.add_parser(
        "memory",
        help="a trunk's step alone: one device, several, quantised",
        description="Bytes and seconds of a trunk without the wire, in every way that this machine can "
        "load it.",
    )
    _add_model(memory)
    memory.add_argument("--compute", choices=_MODES, default="exact")
    _add_out(memory)
    memory.set_defaults(handler=_memory)


def _add_experiments(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    experiments = kinds.add_parser(
        "experiments",
        help="several experiments on one trunk, beside one on the same trunk",
        description="A trunk process that serves several experiments over one base: its memory, and the "
        "tokens a second of all of them together, in turns with one experiment of as many clients.",
    )
    experiments.add_argument("--preset", choices=_PRESETS, default="tiny")
    experiments.add_argument("--experiments", type=int, default=8, metavar="N")
    experiments.add_argument(
        "--micro-batches", type=int, default=8, metavar="N", help="of each client in a round"
    )
    experiments.add_argument("--repeats", type=int, default=5, metavar="N", help="rounds of each")
    experiments.add_argument("--threads", type=int, default=1, metavar="N", help="of each process")
    experiments.add_argument(
        "--device", default="auto", help="cpu, cuda; default: cuda if it is there"
    )
    _add_out(experiments)
    experiments.set_defaults(handler=_experiments)


def _add_clients(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    clients = kinds.add_parser(
        "clients",
        help="a trunk's tokens a second and memory by how many clients train at once",
        description="A trunk in a process of its own, and sessions without models that keep it busy; "
        "beside the trunk's arithmetic alone, on the same micro-batch.",
    )
    _add_model(clients, steps=2)
    clients.add_argument("--repeats", type=int, default=3, metavar="N", help="turns of all")
    clients.add_argument(
        "--clients", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64], metavar="N"
    )
    clients.add_argument("--rows", type=int, default=1, metavar="N", help="of each client")
    clients.add_argument("--transport", default="auto", metavar="NAME")
    clients.add_argument("--window-batches", default="off", choices=("off", "on"))
    clients.add_argument("--activation-memory", type=float, default=1.0, metavar="GiB")
    clients.add_argument("--threads", type=int, default=1, metavar="N", help="of the trunk")
    _add_out(clients)
    clients.set_defaults(handler=_clients)


def _add_aggregation(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    aggregation = kinds.add_parser(
        "aggregation",
        help="aggregating one module's LoRA, beside a dense SVD",
        description="Methods by name, for every size, rank and number of clients, in turns with the "
        "dense mean and its SVD; and how far what a client gets is off the dense one.",
    )
    aggregation.add_argument(
        "--methods", nargs="+", default=["product-delta", "flexlora", "fedit"], metavar="NAME"
    )
    aggregation.add_argument("--sizes", type=int, nargs="+", default=[512, 1024], metavar="N")
    aggregation.add_argument("--ranks", type=int, nargs="+", default=[16], metavar="N")
    aggregation.add_argument("--clients", type=int, nargs="+", default=[4, 16], metavar="N")
    aggregation.add_argument("--repeats", type=int, default=3)
    aggregation.add_argument("--threads", type=int, default=1, metavar="N")
    _add_out(aggregation)
    aggregation.set_defaults(handler=_aggregation)


def _add_quickstart(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    quickstart = kinds.add_parser(
        "quickstart",
        help="a whole run by its phases, beside plain PEFT on the same tokens",
        description="flower-split run of an app, in turns with one process of transformers and PEFT "
        "that trains and evaluates on the same batches. The whole quick start takes minutes: "
        "--run-config shortens it.",
    )
    quickstart.add_argument(
        "app", type=Path, nargs="?", default=Path("simulations/quickstart"), help="its directory"
    )
    quickstart.add_argument("--run-config", "-c", action="append", metavar="KEY=VALUE …")
    quickstart.add_argument("--local", action="store_true", help="as flower-split run --local")
    quickstart.add_argument("--repeats", type=int, default=1)
    quickstart.add_argument(
        "--threads", type=int, default=0, metavar="N", help="of plain PEFT; default: every core"
    )
    _add_out(quickstart)
    quickstart.set_defaults(handler=_quickstart)


def _add_model(parser: argparse.ArgumentParser, steps: int = 8) -> None:
    parser.add_argument("--preset", choices=_PRESETS, default="tiny")
    parser.add_argument("--steps", type=int, default=steps, metavar="N", help="that are timed")
    parser.add_argument("--device", default="auto", help="cpu, cuda; default: cuda if there is one")


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write the figures there as JSON and PNG"
    )


def _console() -> "Console":
    from rich.console import Console

    return Console(width=max(Console().width, 180))  # a narrower table cannot be read


def _transport(arguments: argparse.Namespace) -> int:
    # Torch takes seconds to load: only the command that needs it does.
    from flower_split.bench.shaped_link import Link
    from flower_split.bench.transport import TransportBench, measure_transport
    from flower_split.errors import ConfigError

    link = None
    if arguments.link is not None:
        link = Link(arguments.link, (arguments.round_trip or 0.0) / 1e3)
    elif arguments.round_trip is not None:
        raise ConfigError(
            f"--round-trip {arguments.round_trip:g} is of a link, and none is named. Give its rate as "
            "--link, in Mbit/s."
        )
    bench = TransportBench(
        sizes=tuple(arguments.sizes),
        repeats=arguments.repeats,
        link=link,
        stream_window=arguments.stream_window,
    )
    measure_transport(bench).tell(_console(), arguments.out)
    return 0


def _step(arguments: argparse.Namespace) -> int:
    from flower_split.bench.step import StepBench, measure_step
    from flower_split.runtime.devices import resolve_device
    from flower_split.runtime.logs import quiet_libraries

    quiet_libraries()
    device = str(resolve_device(arguments.device, "--device"))
    bench = StepBench(
        preset=arguments.preset,
        device=device,
        compute=tuple(arguments.compute or (("exact",) if device == "cpu" else _MODES)),
        transports=tuple(arguments.transport),
        clients=tuple(arguments.clients),
        rows_each=arguments.rows,
        steps=arguments.steps,
        accumulate=arguments.accumulate,
        in_flight=arguments.in_flight,
        num_threads=arguments.threads,
        kv_heads=arguments.kv_heads,
        wire_dtype=arguments.wire_dtype,
        gradient_wire_dtype=arguments.gradient_wire_dtype,
        window_batches="on" if arguments.replicas > 1 else arguments.window_batches,
        batch_positions=arguments.batch_positions,
        activation_memory=arguments.activation_memory,
        replicas=arguments.replicas,
        tensor_parallel=arguments.tensor_parallel,
        compiled=arguments.compiled,
    )
    measure_step(bench).tell(_console(), arguments.out)
    return 0


def _memory(arguments: argparse.Namespace) -> int:
    from flower_split.bench.memory import MemoryBench, measure_memory
    from flower_split.runtime.devices import resolve_device
    from flower_split.runtime.logs import quiet_libraries

    quiet_libraries()
    bench = MemoryBench(
        preset=arguments.preset,
        steps=arguments.steps,
        device=str(resolve_device(arguments.device, "--device")),
        compute=arguments.compute,
    )
    measure_memory(bench).tell(_console(), arguments.out)
    return 0


def _experiments(arguments: argparse.Namespace) -> int:
    from flower_split.bench.experiments import ExperimentsBench, measure_experiments
    from flower_split.runtime.devices import resolve_device
    from flower_split.runtime.logs import quiet_libraries

    quiet_libraries()
    bench = ExperimentsBench(
        preset=arguments.preset,
        device=str(resolve_device(arguments.device, "--device")),
        experiments=arguments.experiments,
        micro_batches=arguments.micro_batches,
        repeats=arguments.repeats,
        num_threads=arguments.threads,
    )
    measure_experiments(bench).tell(_console(), arguments.out)
    return 0


def _clients(arguments: argparse.Namespace) -> int:
    from flower_split.bench.clients import ClientsBench, measure_clients
    from flower_split.runtime.devices import resolve_device
    from flower_split.runtime.logs import quiet_libraries

    quiet_libraries()
    bench = ClientsBench(
        preset=arguments.preset,
        clients=tuple(arguments.clients),
        rows_each=arguments.rows,
        steps=arguments.steps,
        repeats=arguments.repeats,
        transport=arguments.transport,
        window_batches=arguments.window_batches,
        activation_memory=arguments.activation_memory,
        device=str(resolve_device(arguments.device, "--device")),
        num_threads=arguments.threads,
    )
    measure_clients(bench).tell(_console(), arguments.out)
    return 0


def _aggregation(arguments: argparse.Namespace) -> int:
    from flower_split.bench.aggregation import AggregationBench, measure_aggregation

    bench = AggregationBench(
        methods=tuple(arguments.methods),
        sizes=tuple(arguments.sizes),
        ranks=tuple(arguments.ranks),
        clients=tuple(arguments.clients),
        repeats=arguments.repeats,
        num_threads=arguments.threads,
    )
    measure_aggregation(bench).tell(_console(), arguments.out)
    return 0


def _quickstart(arguments: argparse.Namespace) -> int:
    from flower_split.bench.quickstart import QuickstartBench, measure_quickstart
    from flower_split.cli.app_config import load_app_config

    bench = QuickstartBench(
        app=arguments.app,
        config=load_app_config(arguments.app, arguments.run_config),
        run_config=tuple(arguments.run_config or ()),
        local=arguments.local,
        repeats=arguments.repeats,
        num_threads=arguments.threads,
    )
    measure_quickstart(bench).tell(_console(), arguments.out)
    return 0
