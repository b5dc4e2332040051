"""Small images made through the public builder."""

from __future__ import annotations

import io
import tarfile

import pytest

from erofsgen.build.options import BuildOptions
from erofsgen.build.pipeline import build_image
from erofsgen.oci.images import open_image


def write_tar(path, files, **attributes):
    """A tar of regular files: {name: bytes}."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name.decode())
            member.size = len(data)
            for key, value in attributes.items():
                setattr(member, key, value)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def make_image(tmp_path):
    """make_image(store, tag, {name: bytes}, **options) -> BuildResult"""

    def make(store, tag, files, **options):
        path = write_tar(tmp_path / f"{tag}.tar", files)
        with open_image(f"tar:{path}") as source:
            return build_image(source, store, tag=tag, options=BuildOptions(**options))

    return make
