"""``erofsgen profile record``: a start in full."""

from __future__ import annotations

import click

from erofsgen.cli.shared import Settings, verb


@verb(json=True, name="record")
@click.argument("cmd", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND...")
@click.option("--name", metavar="NAME", help="What the profile is called; by default the container's command.")
@click.option("--push/--no-push", default=True, help="Merge it into what the store has; default: yes.")
def command(settings: Settings, cmd: tuple[str, ...], name: str | None, push: bool) -> int:
    """Record what a start touches.

    COMMAND is an `erofsgen run` or `erofsgen mount`, which is recorded until the container ends or the image is
    unmounted. Nothing is prefetched for it unless it says so. Daemons record all lazy mounts by themselves; only this
    sees reads of what is complete, too, and brings the profile to the store. The exit code is COMMAND's.

    \b
    erofsgen profile record -- erofsgen run python -- python3 -c "import numpy"
    erofsgen profile record --name serve -- erofsgen run web
    """
    from erofsgen.cli import output
    from erofsgen.host.prefetch.record import record
    from erofsgen.host.profiles import HostProfiles
    from erofsgen.host.profilework import push as push_profiles
    from erofsgen.store.image import Image

    recorded = record(cmd, root=settings.root, store=settings.store, name=name)
    for facts in recorded.recordings:
        if push:
            push_profiles(HostProfiles(settings.root), Image.open(settings.open_store(change=True), facts["image"]))
    if settings.json:
        output.document(recorded.recordings)
        return recorded.exit_code
    for facts in recorded.recordings:
        output.line(
            f"{output.one_line(facts['command']) or 'mount'}: {output.counted(facts['chunks'], 'chunk')}, "
            f"{output.size(facts['bytes'])}; waited {facts['waited']:.2f} s; "
            f"{output.counted(facts['runs'], 'run')} in all{', pushed' if push else ''}"
        )
    if not recorded.recordings:
        output.line("nothing was recorded: nothing was mounted lazily, or it is mounted still")
    return recorded.exit_code


command.allow_interspersed_args = False  # options behind COMMAND are its own
