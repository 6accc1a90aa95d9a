"""``flower-split simulate``: rounds of a federation on paper, with the costs of a plan or of a real run."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from flower_split.cli.app_config import load_app_config
from flower_split.cli.overrides import parse_overrides
from flower_split.cli.plan.command import PlanCommand, micro_batch_seconds
from flower_split.cli.plan.dry_run import CLIENT, TRUNK, dry_run
from flower_split.cli.plan.wire_bytes import experiment_name, step_bytes
from flower_split.config import RunConfig, parse_run_config, resolved_run_config
from flower_split.errors import ConfigError
from flower_split.runs.directory import RunDirectory
from flower_split.runs.summary import markdown_table
from flower_split.runtime.exit_codes import COMPLETED
from flower_split.scale.calibration import Calibration, calibrate
from flower_split.scale.costs import Costs
from flower_split.scale.prediction import Job, Prediction, predict
from flower_split.scale.setting import Link, Pace, Prices, Setting, Work
from flower_split.server.federation.handshake import num_participants
from flower_split.server.step_ends import finish_rule

_MEGA, _HOUR = 1e6, 3600.0
HEADER = (
    "clients", "cohort", "s a round", "held up by", "trunk computes", "trunk link", "a client computes",
    "a client waits", "MB trunk", "MB adapters", "s to evaluate all", "h in all", "cost",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulateCommand:
    """What the command line asks for."""

    job: Path  # an app's directory, or a run's
    run_config: Sequence[str] | None = None  # values of --run-config
    clients: Sequence[int] = ()  # of the federation; none: the run config's
    cohort: Sequence[int] = ()  # clients of a round; none: fraction-train of them
    links: Sequence[str] = ("100:20",)
    slower: Sequence[str] = ()
    hub_megabits: float = 10_000.0
    replicas: int = 1
    cores: int = 0
    places: int = 768
    rounds: int = 1
    costs: Sequence[str] = ()  # NAME=VALUE
    client_gflops: float = 0.0
    trunk_gflops: float = 0.0
    prices: Prices = field(default_factory=Prices)
    as_json: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One federation: what is predicted of it, or why it cannot work."""

    clients: int
    cohort: int
    prediction: Prediction | None
    problem: str = ""


def simulate(command: SimulateCommand) -> int:
    """Print what is predicted of every federation that was asked for.

    Raises:
        FlowerSplitError: The job, a cost or an option is wrong.
    """
    config, measured = _job_of(command)
    costs = measured.costs.changed(command.costs)
    work = Work.of(
        config,
        steps=measured.steps,
        eval_batches=measured.eval_batches,
        ends_together=finish_rule(config) is not None,
    )
    rows = [
        _row(command, config, work, costs, clients, cohort)
        for clients in command.clients or (config.num_clients,)
        for cohort in _cohorts(command, config, clients)
    ]
    if command.as_json:
        print(json.dumps({"costs": asdict(costs), "rows": [asdict(row) for row in rows]}))
        return COMPLETED
    print("\n".join([*_about(config, work, costs, measured), "", markdown_table(_cells(rows))]))
    for row in rows:
        if row.problem:
            print(f"\n{row.clients} clients, {row.cohort} a round: {row.problem}")
    return COMPLETED


def _cohorts(command: SimulateCommand, config: RunConfig, clients: int) -> list[int]:
    """Return how many of the clients train in a round: as asked for, as far as there are so many."""
    asked = command.cohort or (num_participants(clients, config.fraction_train),)
    return list(dict.fromkeys(min(clients, count) for count in asked))


def costs_of_plan(config: RunConfig, command: PlanCommand) -> Costs:
    """Return the costs that ``flower-split plan`` tells: arithmetic over a rate, and the wire's bytes.

    Raises:
        SplitError: The model's configuration cannot be read.
        ConfigError: The plan cannot tell this job.
    """
    run = dry_run(config)
    client, trunk = micro_batch_seconds(config, run, command)
    moved = step_bytes(config, run, experiment_name(config))
    count = config.train.gradient_accumulation_steps
    return Costs(
        client_seconds=client,
        trunk_seconds=trunk,
        sent_bytes=moved.sent / count,
        received_bytes=moved.received / count,
        adapter_bytes=run.parts[CLIENT].trained_bytes,
        trunk_adapter_bytes=run.parts[TRUNK].trained_bytes,
    )


def _job_of(command: SimulateCommand) -> tuple[RunConfig, Calibration]:
    """Return the config and the costs, of a run where there is one, else by the plan."""
    if (command.job / "metrics.jsonl").exists():
        run = RunDirectory.open(command.job)
        measured = calibrate(run, ends_together=finish_rule(run.config) is not None)
        changed = parse_overrides(command.run_config)
        config = parse_run_config({**resolved_run_config(run.config), **changed})
        return config, replace(measured, steps=config.train.local_steps or measured.steps)
    config = load_app_config(command.job, command.run_config)
    if not config.train.local_steps:
        raise ConfigError(
            "how many steps train.local-epochs are depends on the data, which is not read here. Name a "
            "run's directory instead of an app, or give train.local-steps by --run-config."
        )
    plan = PlanCommand(
        app=command.job, client_gflops=command.client_gflops, trunk_gflops=command.trunk_gflops
    )
    measured = Calibration(
        costs=costs_of_plan(config, plan),
        steps=config.train.local_steps,
        eval_batches=config.data.max_eval_batches,
        training_seconds=0.0,
        notes=[
            "costs are those of flower-split plan: arithmetic and bytes. What calls, steps, aggregation "
            "and rounds take beside counts 0 unless --cost says otherwise; a run's directory instead of "
            "the app has most of it, measured."
        ],
    )
    return config, measured


def _row(
    command: SimulateCommand,
    config: RunConfig,
    work: Work,
    costs: Costs,
    clients: int,
    cohort: int,
) -> Row:
    if work.concurrency:
        cohort = min(clients, config.strategy.concurrency or clients)
        work = replace(work, concurrency=cohort)
    setting = Setting(
        clients=clients,
        cohort=cohort,
        links=[Link.parse(text) for text in command.links],
        slower=[Pace.parse(text) for text in command.slower],
        hub_megabits=command.hub_megabits,
        replicas=command.replicas,
        cores=command.cores,
        waiting_calls=command.places,
        rounds=command.rounds,
        seed=config.seed,
        prices=command.prices,
    )
    job = Job(
        rounds=config.num_server_rounds,
        evaluations=max(0, config.num_server_rounds // config.evaluate_every - 1),
        evaluating=max(1, int(clients * config.fraction_evaluate + 1e-9)),
    )
    try:
        return Row(clients=clients, cohort=cohort, prediction=predict(work, costs, setting, job))
    except ConfigError as error:
        return Row(clients=clients, cohort=cohort, prediction=None, problem=str(error))


def _about(config: RunConfig, work: Work, costs: Costs, measured: Calibration) -> list[str]:
    if work.concurrency:
        kind = f"asynchronous, {work.buffer} arrivals a round"
    else:
        kind = f"trunk.step-every {work.step_every}, window batches {config.trunk.window_batches}"
    shown = ", ".join(f"{name} {value:.4g}" for name, value in asdict(costs).items() if value)
    lines = [
        f"{work.steps} steps of {work.micro_batches} micro-batches, {work.in_flight} in flight, mode "
        f"{config.mode}, {kind}, {config.num_server_rounds} rounds",
        f"costs: {shown.replace('_', '-')}",
    ]
    if measured.training_seconds:
        lines.append(
            f"the run's own rounds trained for {measured.training_seconds:,.2f} s (median)"
        )
    return [*lines, *(f"note: {note}" for note in measured.notes)]


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    cells = [list(HEADER)]
    for row in rows:
        found = row.prediction
        if found is None:
            cells.append([f"{row.clients:,}", f"{row.cohort:,}", "cannot run", *["–"] * 10])
            continue
        cells.append(
            [
                f"{row.clients:,}",
                f"{row.cohort:,}",
                f"{found.round_seconds:,.2f}",
                found.holds_up,
                f"{found.trunk_share:.0%}",
                f"{found.link_share:.0%}",
                f"{found.client_share:.0%}",
                f"{found.wait_share:.0%}",
                f"{found.trunk_bytes / _MEGA:,.1f}",
                f"{found.adapter_bytes / _MEGA:,.1f}",
                f"{found.evaluation_seconds:,.0f}" if found.evaluation_seconds else "–",
                f"{found.job_seconds / _HOUR:,.2f}",
                f"{found.job_cost:,.2f}" if found.job_cost else "–",
            ]
        )
    return cells
