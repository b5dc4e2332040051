"""``erofsgen doctor``: what this host can do."""

from __future__ import annotations

from erofsgen.cli.shared import Settings, verb


@verb(json=True)
def command(settings: Settings) -> int:
    """Examine this kernel and host.

    Everything is tried, as far as that leaves nothing behind: what there is, what is missing and how to get it, and
    which plane a mount takes. The exit code is 0 where a lazy plane works, 8 otherwise.
    """
    from erofsgen.cli import output
    from erofsgen.errors import UnsupportedError
    from erofsgen.host.doctor import examine

    found = examine([settings.root])
    code = 0 if found.lazy else UnsupportedError.exit_code
    if settings.json:
        output.document(found)
        return code
    output.table(
        ["CHECK", "RESULT", "FOUND", "WHAT TO DO"],
        [
            (finding.check, finding.result, output.printable(finding.detail), output.printable(finding.advice or ""))
            for finding in found.checks
        ],
    )
    output.line()
    output.table(
        ["PLANE", "WORKS", "BECAUSE"],
        [
            (
                plane.plane + (" (auto)" if plane.plane == found.auto else ""),
                "yes" if plane.works else "no",
                plane.because or "",
            )
            for plane in found.planes
        ],
    )
    if found.auto is None:
        output.line("\nno plane works")
    return code
