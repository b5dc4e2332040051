"""``vmtests/run``: boots kernels, runs the cases in them, prints what came of it and keeps docs/conformance.md."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NoReturn

import click

from erofsgen.errors import ErofsgenError
from vmtests import conformance, guest, phases
from vmtests.guest import NOT_RUN, End, Outcome
from vmtests.kernels import CATALOGUE, QUICK, Kernel, provide
from vmtests.phases import Run
from vmtests.places import CASES, REPOSITORY, RUNS, SOURCES, locked, run
from vmtests.results import Verdict
from vmtests.virtualisation import kvm_works

JOBS = max(1, len(os.sched_getaffinity(0)) // guest.CPUS)
"""Guests at a time. More take as long together, and each is so slow that its daemons' deadlines pass."""

DEADLINE = 1500
"""Seconds one boot may take."""


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--kernel", "names", multiple=True, metavar="NAME", help="May be repeated. Default: the quick set.")
@click.option("--all", "everything", is_flag=True, help="All kernels.")
@click.option("-k", "expression", default="", metavar="EXPR", help="Only cases that match, as with pytest.")
@click.option("--list", "listing", is_flag=True, help="List the kernels, and stop.")
@click.option("--report", type=click.Path(file_okay=False, path_type=Path), help="Copy report logs and consoles here.")
@click.option("--no-docs", is_flag=True, help="Leave docs/conformance.md as it is; so does -k without --amend.")
@click.option("--amend", is_flag=True, help="With -k: put the cells of the cases that ran into the table.")
@click.option("--update", is_flag=True, help="See whether Debian has newer kernels than the cache.")
@click.option("--accel", type=click.Choice(["auto", "kvm", "tcg"]), default="auto", help="Default: KVM where it works.")
@click.option("--deadline", type=float, default=DEADLINE, metavar="SECONDS", help=f"For one boot. Default: {DEADLINE}.")
@click.option(
    "--jobs", type=click.IntRange(min=1), default=JOBS, metavar="N", help=f"Guests at a time. Default: {JOBS}."
)
def command(
    names: tuple[str, ...], everything: bool, expression: str, listing: bool, report: Path | None, no_docs: bool,
    amend: bool, update: bool, accel: str, deadline: float, jobs: int,
) -> int:  # fmt: skip
    """Run the cases of vmtests/cases on real kernels, in QEMU."""
    if listing:
        for entry in CATALOGUE.values():
            click.echo(f"{entry.name:<14} {entry.what}{'  (quick set)' if entry.name in QUICK else ''}")
        return 0
    _compile()
    _prepare(expression)
    wanted = dict.fromkeys(CATALOGUE if everything else names, expression) or _quick(expression)
    kernels = [provide(name, _say, update=update) for name in wanted]
    kvm = kvm_works(kernels[0]) if accel == "auto" else accel == "kvm"
    failures = []
    with ThreadPoolExecutor(jobs) as pool:
        try:
            runs = {pool.submit(_run, kernel, wanted[kernel.name], kvm, deadline): kernel for kernel in kernels}
            for ended in as_completed(runs):
                kernel, outcome = runs[ended], ended.result()
                _print(kernel.name, outcome)
                part = bool(wanted[kernel.name])
                if not no_docs and (amend or not expression):
                    _record(kernel, outcome, "KVM" if kvm else "TCG", amend=amend or part)
                if report:
                    _copy(kernel.name, report)
                if not outcome.passed:
                    failures.append(kernel.name)
        except BaseException:  # an interrupt, for instance: nobody waits for guests any more
            pool.shutdown(wait=False, cancel_futures=True)
            guest.end_all()
            raise
    if failures:
        click.echo(f"failed on {', '.join(failures)}")
    return 1 if failures else 0


def _quick(expression: str) -> dict[str, str]:
    """The quick set's kernels, and what to run on each."""
    if not expression:
        return dict(QUICK)
    return {name: f"({expression}) and {part}" if part else expression for name, part in QUICK.items()}


def _compile() -> None:
    """Byte code for guests, whose root is read-only: without KVM compiling costs every program that starts seconds."""
    run(sys.executable, "-m", "compileall", "-q", *SOURCES, cwd=REPOSITORY)


def _prepare(expression: str) -> None:
    """The demo image, unless only other cases are wanted: they take seconds, it can take minutes."""
    if not expression or "demo" in expression:
        _say("preparing the demo image")
        run(sys.executable, CASES / "demo.py")


def _run(kernel: Kernel, expression: str, kvm: bool, deadline: float) -> Run:
    _say(f"{kernel.name}: booting Linux {kernel.release} with {'KVM' if kvm else 'TCG'}")
    directory = RUNS / kernel.name
    with locked(RUNS / f"{kernel.name}.lock"):
        guest.end_left(directory)
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        guest.make_disks(directory)
        return phases.run_kernel(
            kernel,
            expression,
            directory / "share",
            lambda label, command, environment: guest.boot(
                kernel, directory, label, command, environment, kvm=kvm, deadline=deadline
            ),
        )


def _record(kernel: Kernel, run: Run, virtualisation: str, *, amend: bool) -> None:
    seconds = sum(outcome.seconds for outcome in run.boots.values())
    date = time.strftime("%Y-%m-%d", time.gmtime())
    column = conformance.column(
        run.results, release=kernel.release, date=date, virtualisation=virtualisation, seconds=seconds
    )
    with locked(RUNS / "docs.lock"):
        conformance.record(kernel.name, column, amend=amend)


def _print(name: str, run: Run) -> None:
    for result in run.results:
        if result.verdict is Verdict.FAILED:
            click.echo(f"\n____ {name}: {result.nodeid} ____\n{result.text}\n")
    for trouble in run.troubles:
        click.echo(f"{name}: {trouble}")
    counts = {verdict: sum(result.verdict is verdict for result in run.results) for verdict in Verdict}
    words = ", ".join(f"{count} {verdict.value}" for verdict, count in counts.items() if count) or "no tests"
    seconds = sum(outcome.seconds for outcome in run.boots.values())
    click.echo(f"{name}: {words} in {seconds:.0f} s, {len(run.boots)} boots")
    if not run.passed:
        for outcome in run.boots.values():
            click.echo(f"{name}: console {outcome.console}, output {outcome.output}")
            if outcome.end in (End.CRASHED, End.DEADLINE) or outcome.status == NOT_RUN:
                click.echo("".join(f"    {line}\n" for line in _last_lines(outcome)), nl=False)


def _last_lines(outcome: Outcome, count: int = 12) -> list[str]:
    """The end of what a guest said that ended badly: of its own output, if it came that far, and of its console."""
    texts = [path.read_text(errors="replace") for path in (outcome.output, outcome.console) if path.exists()]
    return [line for text in texts for line in text.splitlines()[-count:]]


def _copy(name: str, report: Path) -> None:
    target = report / name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(RUNS / name, target, ignore=shutil.ignore_patterns("*.img"))


def _say(text: str) -> None:
    click.echo(f"{time.strftime('%H:%M:%S')} {text}", err=True)


def main() -> NoReturn:
    """Entry point of ``vmtests/run``. Exits with 1 if a test failed, else as the program itself does."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # guests are ended on the way out
    try:
        sys.exit(command.main(standalone_mode=False))
    except ErofsgenError as error:
        click.echo(f"vmtests: error: {error}" + (f"\nhint: {error.hint}" if error.hint else ""), err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
