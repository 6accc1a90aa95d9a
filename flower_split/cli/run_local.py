"""``flower-split run --local``: the app's run in a process forked from this one."""

import sys

from flower_split.cli.interrupts import Interrupts
from flower_split.cli.report import check_reports, write_reports_of
from flower_split.cli.run import Job
from flower_split.local.job import LocalJob, load_modules, run_job
from flower_split.local.process import Output, RunProcess
from flower_split.runs.files import FLOWER_FOLDER
from flower_split.runtime.exit_codes import COMPLETED, STOPPED
from flower_split.runtime.secret_files import PRIVATE_DIRECTORY

_LOOK_SECONDS = 0.2


def run_local(job: Job) -> int:
    """Run a job to its end without a SuperLink, and return the exit code."""
    load_modules()  # before the fork, so that every process has them
    folder = job.directory / FLOWER_FOLDER
    folder.mkdir(mode=PRIVATE_DIRECTORY, parents=True, exist_ok=True)
    output = Output(log=folder / "run.log", stream=job.command.stream)
    what = LocalJob(
        folder=job.app.project.parent.absolute(),
        server_app=job.app.server_app,
        client_app=job.app.client_app,
        run_config={**job.app.values, **job.overrides},
    )
    print(f"run in {job.directory}, on this machine alone", flush=True)
    with Interrupts() as interrupts:
        process = RunProcess.start(lambda: run_job(what, before=lambda: _check(job)), output)
        while not process.wait(_LOOK_SECONDS):
            if interrupts.count:
                process.stop()
                print(
                    "flower-split: the run was stopped. Go on after its last committed round: "
                    f"flower-split run APP --local --resume {job.directory}",
                    file=sys.stderr,
                )
                return STOPPED
    if process.exit_code == COMPLETED:
        write_reports_of(job.directory)
    return process.exit_code or COMPLETED


def _check(job: Job) -> None:
    """Do the checks that need torch; nothing has been started yet."""
    from flower_split.cli import preflight

    job.app.make_importable()
    preflight.check_aggregation(job.config)
    adapter, scales = preflight.check_model(job.config)
    preflight.check_trunk(job.config)
    check_reports(job.config)
    preflight.check_loggers(job.config)
    if not (job.app.has_own_server_app or job.config.model.cuts_by_partition):
        settings = preflight.default_settings(job.config)
        preflight.check_clients(job.config, adapter, scales, settings)
