"""``erofsgen inspect``: one image in detail."""

from __future__ import annotations

from erofsgen.cli.shared import Settings, image_argument, verb


@verb(json=True)
@image_argument()
def command(settings: Settings, image: str) -> None:
    """Show an image in detail: index, packs, sharing.

    With --json the manifest and the config, too.

    USED is the part of a pack's device space that the image's files map; SHARED WITH counts the other images that
    have the pack.
    """
    from erofsgen.cli import output
    from erofsgen.store.inspect import inspect

    facts = inspect(settings.open_image(image))
    if settings.json:
        output.document(facts)
        return
    size, index = output.size, facts.index
    stored = sum(pack.stored for pack in facts.packs)
    space = sum(pack.device_size for pack in facts.packs)
    common = sum(pack.used for pack in facts.packs if pack.shared_with)
    where = (
        f"{size(index.mapped_bytes)} in packs, {size(index.inline_bytes)} in the index, {size(index.hole_bytes)} holes"
    )
    blocks = f"{size(index.unique_bytes)} of it used by this image"
    output.facts(
        [
            ("image", output.printable(facts.name)),
            *[("also named", output.printable(name)) for name in facts.names if name != facts.name],
            ("digest", facts.digest),
            ("subject", facts.subject or "-"),
            ("platform", output.one_line(f"{facts.config.get('os', '?')}/{facts.config.get('architecture', '?')}")),
            ("chunk size", size(facts.chunk_size)),
            ("index", f"{size(index.size)}, {size(index.stored)} stored, {index.digest}"),
            ("files", ", ".join(f"{count:,} {kind}" for kind, count in index.inodes.items())),
            ("file data", f"{size(index.file_bytes)}: {where}"),
            ("packs", f"{len(facts.packs)}, {size(stored)} stored; {size(space)} of device space, {blocks}"),
            ("shared", f"{size(common)} in packs that other images have, too ({output.share(common, space)})"),
        ]
    )
    if not facts.packs:
        return
    output.line()
    output.table(
        ["SLOT", "PACK", "KIND", "STORED", "DEVICE", "RATIO", "USED", "SHARE", "SHARED WITH"],
        [
            (
                str(pack.slot),
                pack.digest.removeprefix("sha256:")[:12],
                "missing" if pack.missing else pack.kind if pack.hot is None else f"{pack.kind}, hot",
                size(pack.stored),
                size(pack.device_size),
                f"{pack.device_size / pack.stored:.2f}" if pack.stored else "-",
                size(pack.used),
                output.share(pack.used, pack.device_size),
                _few([output.printable(name) for name in pack.shared_with]),
            )
            for pack in facts.packs
        ],
        right=(0, 3, 4, 5, 6, 7),
    )


def _few(names: list[str], limit: int = 3) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "") or "-"
