"""Fixtures of the tests of FUSE servers: hosts of every variant, and images in them."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fusekit import VARIANTS, Site, Variant
from handmade import Sample, make_wide


@pytest.fixture(params=VARIANTS, scope="session")
def variant(request: pytest.FixtureRequest) -> Variant:
    """Each plane, blockfuse both ways."""
    return VARIANTS[request.param]


@pytest.fixture(scope="session")
def shared(variant: Variant, require_root: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A site whose daemon goes on, with what its servers are forked from."""
    site = Site(tmp_path_factory.mktemp("shared"), variant)
    yield site
    site.end()


@pytest.fixture
def make_site(tmp_path: Path, require_root: None) -> Iterator[Callable[..., Site]]:
    """Sites of a test's own, which may kill what it likes."""
    made: list[Site] = []

    def make(variant: Variant, **options: float) -> Site:
        place = tmp_path / f"site{len(made)}"
        place.mkdir()
        made.append(Site(place, variant, **options))
        return made[-1]

    yield make
    for site in made:
        site.end()


@pytest.fixture
def site(shared: Site) -> Iterator[Site]:
    """The shared site for tests that kill no more than comes again by itself; all is unmounted afterwards."""
    yield shared
    shared.clean()


@pytest.fixture
def own_site(variant: Variant, make_site: Callable[..., Site]) -> Site:
    """For tests after which nothing works any more."""
    return make_site(variant)


@pytest.fixture
def wide_called(shared: Site) -> Callable[[str], Sample]:
    """Makes an image of 61 frames of 256 KiB, in three packs like no other image's, in the shared site's store."""
    return lambda name: make_wide(shared.maker, name, seed=zlib.crc32(name.encode()))


@pytest.fixture
def wide(wide_called: Callable[[str], Sample], request: pytest.FixtureRequest) -> Sample:
    return wide_called(request.node.originalname)
