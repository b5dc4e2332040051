"""``erofsgen profile ls``: which profiles there are."""

from __future__ import annotations

from erofsgen.cli.shared import Settings, image_argument, verb


@verb(json=True, name="ls")
@image_argument(required=False)
def command(settings: Settings, image: str | None) -> None:
    """List profiles, of all images or of one.

    RUNS is how many runs stand behind a profile.

    WHERE is host for runs of this host that the store has not got, store for what lies beside the image there, and
    fetched for what lay there when it was asked last, if it does not answer.
    """
    from erofsgen.cli import output
    from erofsgen.host.profiles import HostProfiles
    from erofsgen.host.profilework import list_all, list_one
    from erofsgen.host.pull import find

    profiles = HostProfiles(settings.root)
    if image is None:
        rows = list_all(profiles, settings.store)
    else:
        rows = list_one(profiles, find(settings.cache(), settings.store, image))
    if settings.json:
        output.document(rows)
        return
    output.table(
        [
            "IMAGE",
            "NAMES",
            "COMMAND",
            "RUNS",
            "CHUNKS",
            "SIZE",
            "WHERE",
            "PROBLEM" if any(row.problem for row in rows) else "",
        ],
        [
            (
                row.image.removeprefix("sha256:")[:12],
                output.printable(" ".join(row.names)),
                output.quoted(row.command),
                str(row.runs) if row.runs else "guessed",
                f"{row.chunks:,}",
                output.size(row.bytes),
                row.where,
                output.one_line(row.problem or ""),
            )
            for row in rows
        ],
        right=(3, 4, 5),
    )
