"""``erofsgen build``: a container image into the store."""

from __future__ import annotations

from typing import Any

import click

from erofsgen.cli.shared import Settings, Size, verb


@verb(json=True)
@click.argument("image")
@click.option("--tag", metavar="NAME", help="Name of the result; the image's own name by default.")
@click.option(
    "--platform", metavar="OS/ARCH[/VARIANT]", help="Which image of a multi-platform one; default: this host."
)
@click.option("--chunk-size", type=Size(), metavar="SIZE", help="Unit of deduplication, 4K to 16M; default: 1M.")
@click.option("--compression-level", type=int, metavar="N", help="zstd level, 1 to 22 or negative; default: 3.")
@click.option("--threads", type=int, metavar="N", help="Compression threads; default: one per core.")
@click.option("--max-devices", type=int, metavar="N", help="Packs the image may have, 1 to 65535; default: 256.")
@click.option("--dedup/--no-dedup", default=None, help="Use chunks of packs that are in the store; default: yes.")
@click.option("--share-pages", is_flag=True, default=None, help="Let Linux 7.0 and later share page cache by content.")
@click.option("--tls-verify/--no-tls-verify", default=True, help="Check the registry's certificate; default: yes.")
@click.option(
    "--authfile", type=click.Path(), metavar="FILE", help="Registry credentials, as podman and skopeo take them."
)
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
    from erofsgen.build.options import BuildOptions
    from erofsgen.build.pipeline import build_image
    from erofsgen.cli import output
    from erofsgen.oci.images import open_image

    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    chosen = BuildOptions(**given)
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
