"""What makes a test a case of the guests: its phase, its cell of the conformance table, the guest it needs."""

from __future__ import annotations

import os
import sys
import zlib
from pathlib import Path

import pytest

from erofsgen.host.doctor import plane_works

CASES = Path(__file__).resolve().parent
sys.path.insert(0, str(CASES))
sys.path.insert(0, str(CASES.parents[1] / "tests"))

import handmade  # noqa: E402
import sites  # noqa: E402

PHASE = os.environ.get("EROFSGEN_VM_PHASE", "main")


def pytest_configure(config):
    config.addinivalue_line("markers", "phase(name): the boot to run in: main (the default), reboot or aftercut")
    config.addinivalue_line(
        "markers", "case(name, plane=None): the row of the conformance table; plane may also be a parameter of the test"
    )


def pytest_collection_modifyitems(config, items):
    chosen = [item for item in items if phase(item) == PHASE]
    config.hook.pytest_deselected(items=[item for item in items if phase(item) != PHASE])
    items[:] = chosen
    for item in items:
        item.user_properties.extend(cell(item))
        if "EROFSGEN_VM" not in os.environ:
            item.add_marker(pytest.mark.skip(reason="runs in a guest, see vmtests/run"))


def phase(item):
    marker = item.get_closest_marker("phase")
    return marker.args[0] if marker else "main"


def cell(item):
    """The properties that say where in the table a result goes. A test without them is in no table."""
    marker = item.get_closest_marker("case")
    if marker is None:
        return []
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    plane = marker.kwargs.get("plane") or parameters.get("plane")
    return [("case", marker.args[0]), *([("plane", plane)] if isinstance(plane, str) else [])]


@pytest.fixture(scope="session")
def network():
    """The loopback interface, up."""
    from pyroute2 import IPRoute

    with IPRoute() as routes:
        (loopback,) = routes.link_lookup(ifname="lo")
        routes.link("set", index=loopback, state="up")


# --- planes ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=sites.PLANES, scope="session")
def plane(request):
    """Each plane in turn, the reason why it cannot be here as the skip's."""
    finding = plane_works(Path(os.environ["EROFSGEN_VM_EXT4"]), request.param)
    if not finding.ok:
        pytest.skip(finding.detail)
    return request.param


@pytest.fixture
def lazy_plane(plane):
    """The lazy ones of them."""
    if plane == "eager":
        pytest.skip("nothing is missing from an eager mount")
    return plane


@pytest.fixture(scope="session")
def lasting_site(plane, tmp_path_factory):
    found = sites.Site(tmp_path_factory.mktemp(f"shared-{plane}"), plane)
    yield found
    found.end()


@pytest.fixture
def shared(lasting_site):
    """A site for cases that only read, whose daemon goes on: to start one takes seconds in a guest."""
    yield lasting_site
    for target in tuple(lasting_site.mounted):
        lasting_site.unmount(target, force=True)


@pytest.fixture
def fresh(shared, request):
    """An image of 61 frames in the shared site, like no other case's."""
    name = request.node.originalname
    return handmade.make_wide(shared.maker, name, seed=zlib.crc32(name.encode()))


@pytest.fixture
def site(plane, tmp_path):
    """A root, a store and room for mounts on the ext4 disk; everything is gone afterwards."""
    found = sites.Site(tmp_path, plane)
    yield found
    found.end()


@pytest.fixture
def wide(site):
    """An image of 61 frames in the site's store."""
    return handmade.make_wide(site.maker)
