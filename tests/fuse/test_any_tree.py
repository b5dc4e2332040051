"""Any tree: the index reader, what the kernel is told over FUSE, and the kernel's EROFS agree on every entry."""

from __future__ import annotations

import errno
import random
import stat
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pyfuse3
import pytest
import trio
from anytree import CHUNK, DEVICES, trees, with_table
from fusekit import ONLY_FUSE, Site, same_links, told_by_index, tree_of
from handmade import ImageMaker, PackMade, chunks_of
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from erofsgen.erofs.reader import Index
from erofsgen.erofs.tree import BLOCK, Device, Inode, walk
from erofsgen.erofs.writer import write_index
from erofsgen.host.cache.cache import HostCache
from erofsgen.host.mount.mounts import mount, unmount
from erofsgen.store.directory import DirectoryStore
from fusefallback.content import Content, ServedPack
from fusefallback.link import Link
from fusefallback.tree import Tree
from fusefallback.tuning import Tuning

# a tree that fails may be long to print
pytestmark = pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")

ROOT = SimpleNamespace(uid=0)
SOMEBODY = SimpleNamespace(uid=1000)
QUICK = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))


def devices() -> list[bytes]:
    chance = random.Random(8)
    return [chance.randbytes(device.blocks * BLOCK) for device in DEVICES]


def packs_of(maker: ImageMaker) -> list[PackMade]:
    return [maker.pack(chunks_of(device)) for device in devices()]


class Packs(NamedTuple):
    bytes: list[bytes]
    served: list[ServedPack]
    devices: list[Device]


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Packs]:
    """Complete ones, in a cache of their own."""
    place = tmp_path_factory.mktemp("packs")
    maker = ImageMaker(DirectoryStore(place / "store"))
    made = packs_of(maker)
    image = maker.publish("all", Inode(stat.S_IFDIR | 0o755, children={}), with_table(Inode(stat.S_IFDIR)), made)
    _, paths = HostCache(place / "root").materialise(image)
    served = [ServedPack(path, 0) for path in paths]
    yield Packs(devices(), served, [Device(pack.hex, of.blocks) for pack, of in zip(made, DEVICES, strict=True)])
    for pack in served:
        pack.close()


class Deaf:
    """A link with nobody at the other end: all is here, and that it is read is told nobody."""

    def touched(self, pack: str, offset: int, length: int) -> None:
        pass


class Asker:
    """Asks handlers what a kernel would ask, by inode numbers alone. ``batch``: entries that fit into a reply."""

    def __init__(self, tree: Tree, batch: int) -> None:
        self.tree = tree
        self.batch = batch
        self.numbers: dict[int, bytes] = {}

    async def entries(self, inode: int) -> list[tuple[bytes, pyfuse3.EntryAttributes]]:
        handle = await self.tree.opendir(inode, cast(Any, ROOT))
        found: list[tuple[bytes, Any, int]] = []
        start = 0
        while True:
            reply: list[tuple[bytes, Any, int]] = []
            await self.tree.readdir(handle, start, cast(Any, reply))
            if not reply:
                break
            found += reply
            start = reply[-1][2]
        await self.tree.releasedir(handle)
        return [(name, attributes) for name, attributes, _ in found]

    async def read(self, inode: int, offset: int, length: int) -> bytes:
        opened = await self.tree.open(inode, 0, cast(Any, ROOT))
        data = bytes(await self.tree.read(opened.fh, offset, length))
        await self.tree.release(opened.fh)
        return data


@pytest.fixture(scope="module")
def reply_of_lists() -> Iterator[None]:
    """readdir's replies go to a list, which takes some entries at a time."""

    def reply(token: Any, name: bytes, attributes: Any, following: int) -> bool:
        if len(token) == 7:
            return False
        token.append((name, attributes, following))
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyfuse3, "readdir_reply", reply)
        yield


@settings(QUICK, max_examples=40)
@given(trees(), st.data())
def test_the_kernel_is_told_what_the_reader_has(
    packs: Packs, reply_of_lists: None, root: Inode, data: st.DataObject
) -> None:
    image = memoryview(bytes(write_index(root, with_table(root), packs.devices, chunk_size=CHUNK)))
    index = Index(image)
    tree = Tree(index, Content(cast(Link, Deaf()), image, packs.served, Tuning()))
    told = told_by_index(index, lambda device, start, length: packs.bytes[device - 1][start : start + length])
    nodes = dict(index.walk())
    inodes: dict[bytes, int] = {b"": pyfuse3.ROOT_INODE}

    async def compare() -> None:
        asker = Asker(tree, 7)
        for path, node in nodes.items():
            inode, right = inodes[path], told[path]
            attributes = await tree.getattr(inode, cast(Any, ROOT))
            assert attributes.st_ino == inode
            assert (
                attributes.st_mode, attributes.st_nlink, attributes.st_uid, attributes.st_gid, attributes.st_rdev,
                attributes.st_size, attributes.st_mtime_ns,
            ) == (right.mode, right.nlink, right.uid, right.gid, right.rdev, node.size, right.mtime)  # fmt: skip
            names = await tree.listxattr(inode, cast(Any, ROOT))
            assert [(name, await tree.getxattr(inode, name, cast(Any, ROOT))) for name in names] == right.xattrs
            seen = await tree.listxattr(inode, cast(Any, SOMEBODY))
            assert seen == [name for name in names if not name.startswith(b"trusted.")]
            with pytest.raises(pyfuse3.FUSEError) as caught:
                await tree.getxattr(inode, b"user.there-is-no-such-name", cast(Any, ROOT))
            assert caught.value.errno == errno.ENODATA
            if stat.S_ISDIR(node.mode):
                await directory(asker, path, inode)
            elif stat.S_ISLNK(node.mode):
                assert await tree.readlink(inode, cast(Any, ROOT)) == right.content
            elif stat.S_ISREG(node.mode):
                whole = b"".join(right.content)
                assert await asker.read(inode, 0, node.size + 5) == whole
                offset = data.draw(st.integers(0, node.size + 10))
                length = data.draw(st.integers(1, 20_000))
                assert await asker.read(inode, offset, length) == whole[offset : offset + length]

    async def directory(asker: Asker, path: bytes, inode: int) -> None:
        entries = await asker.entries(inode)
        assert sorted(name for name, _ in entries) == [name for name, _ in entries]
        listed = {name: attributes.st_ino for name, attributes in entries}
        assert listed.pop(b".") == inode
        parent = listed.pop(b"..")
        assert parent == (inodes[path.rpartition(b"/")[0]] if path else inode)
        assert (await tree.lookup(inode, b".", cast(Any, ROOT))).st_ino == inode
        assert (await tree.lookup(inode, b"..", cast(Any, ROOT))).st_ino == parent
        assert list(listed) == [name for name, *_ in told[path].content]
        for name, number in listed.items():
            assert (await tree.lookup(inode, name, cast(Any, ROOT))).st_ino == number
            inodes[path + b"/" + name if path else name] = number
        assert (await tree.lookup(inode, b"\xff" * 254, cast(Any, ROOT))).st_ino == 0

    trio.run(compare)
    assert same_links(inodes) == same_links({path: node.nid for path, node in nodes.items()})
    assert tree._open == {}
    assert tree._directories == {}


_LAST_ID = (1 << 32) - 2


def readable(root: Inode) -> Inode:
    """What root can look at through any kernel: ACLs of random bytes are EINVAL, and the owner -1 lets nobody in."""
    for _, inode in walk(root):
        inode.xattrs = tuple(pair for pair in inode.xattrs if not pair[0].startswith(b"system."))
        inode.uid, inode.gid = min(inode.uid, _LAST_ID), min(inode.gid, _LAST_ID)
    return root


@pytest.mark.mount
@ONLY_FUSE
@settings(QUICK, max_examples=6, phases=[Phase.generate])
@given(trees().map(readable))
def test_the_kernel_shows_the_same(
    shared: Site, tmp_path_factory: pytest.TempPathFactory, made: dict[str, Any], root: Inode
) -> None:
    if "packs" not in made:
        made["packs"], made["eager"] = packs_of(shared.maker), tmp_path_factory.mktemp("eager")
    image = shared.maker.publish("any", root, with_table(root), made["packs"], chunk_size=CHUNK)
    bytes_ = devices()
    told = told_by_index(image.index, lambda device, start, length: bytes_[device - 1][start : start + length])
    eager = made["eager"] / "mnt"
    eager.mkdir(exist_ok=True)
    served = shared.mount(image, "any")
    try:
        seen, numbers = tree_of(served)
        mount(image, eager, root=made["eager"] / "root")
        try:
            assert tree_of(eager)[0] == seen
        finally:
            unmount(eager, root=made["eager"] / "root", force=True)
        assert {path: entry._replace(xattrs=None) for path, entry in seen.items()} == {
            path: entry._replace(xattrs=None) for path, entry in told.items()
        }
        assert same_links(numbers) == same_links({path: node.nid for path, node in image.index.walk()})
    finally:
        shared.unmount(served, force=True)


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return {}
