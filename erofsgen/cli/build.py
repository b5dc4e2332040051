"""``erofsgen build``: a container image into the store."""

from __future__ import annotations

import click

from erofsgen.cli.shared import Settings, build_options, chosen_options, verb


@verb(json=True)
@click.argument("image")
@click.option("--tag", metavar="NAME", help="Name of the result; the image's own name by default.")
@click.option(
    "--platform", metavar="OS/ARCH[/VARIANT]", help="Which image of a multi-platform one; default: this host."
)
@build_options
def command(
    settings: Settings,
    image: str,
    tag: str | None,
    platform: str | None,
    tls_verify: bool,
    authfile: str | None,
    **options: int | None,
) -> None:
    """Turn a container image into an erofsgen image.

    IMAGE is docker://NAME, oci:DIR[:TAG], oci-archive:FILE, docker-archive:FILE, dir:DIR or tar:FILE.
    """
    from erofsgen.build.pipeline import build_image
    from erofsgen.cli import output
    from erofsgen.oci.images import open_image

    chosen = chosen_options(options)
    store = settings.open_store(create=True)
    with (
        settings.progress() as progress,
        open_image(
            image,
            platform=platform,
            tls_verify=tls_verify,
            authfile=authfile,
            downloads=store.downloads,
            progress=progress,
        ) as source,
    ):
        result = build_image(source, store, tag=tag, options=chosen, progress=progress)
    if settings.json:
        output.document(result)
        return
    size = output.size
    output.facts(
        [
            ("image", output.printable(result.name)),
            ("digest", result.digest),
            ("files", f"{result.inodes:,}"),
            ("layers", f"{result.layers}, {result.reused_layers} converted before"),
            ("file data", f"{size(result.file_bytes)} read, {size(result.deduplicated_bytes)} of it deduplicated"),
            ("index", f"{size(result.index_size)}, {size(result.index_stored)} stored"),
            ("packs", f"{result.packs}, {result.new_packs} new; {size(result.pack_bytes)} stored"),
            ("time", f"{result.seconds:.2f} s"),
        ]
    )
