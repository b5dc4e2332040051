"""An image's files into a directory, faithfully and without ever following what it has just made.

The whole index is walked before anything is written, which shows that its directories form a tree and that names are
names. Every name is used relative to the descriptor of its directory, with O_NOFOLLOW and O_EXCL, so neither a hostile
index nor somebody else who writes below the destination can lead a write outside. Attributes that a later step would
change come last: owner before mode and capabilities, times at the end, a directory's when its content is complete.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import BinaryIO, Final

import msgspec

from erofsgen.erofs.node import Node
from erofsgen.errors import StorageError, UsageError
from erofsgen.progress import SILENT, Progress, Task
from erofsgen.store.image import Image

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_PIECE: Final = 1 << 20
_HANDLE: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class Extracted(msgspec.Struct, frozen=True):
    """What was written: ``entries`` names, ``bytes`` of file data, ``notes`` on what could not be expressed."""

    entries: int
    bytes: int
    notes: list[str]


def extract(image: Image, destination: str | os.PathLike[str], *, progress: Progress = SILENT) -> Extracted:
    """Write the image's tree into ``destination``, which is created where it is missing and must be empty.

    Owners, devices and privileged extended attributes need root; for others they are left out, and ``notes`` says so.
    Raises UsageError (not empty), StorageError (the file system refuses; what was written stays), and what reading the
    image raises.
    """
    path = os.fspath(destination)
    with ExitStack() as stack:
        try:
            os.makedirs(path, exist_ok=True)
            # the destination itself may be named through a symbolic link: it is the user's
            top = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, top)
            occupied = bool(os.listdir(top))
        except OSError as error:
            raise _refused(path, error) from error
        if occupied:
            raise UsageError(f"{path}: not empty", hint="extract into a new or an empty directory")
        _allow_depth()
        with progress.task(f"extracting {image.name}", file_bytes(image)) as task:
            return _Extraction(image, path, top, task).run()


@contextmanager
def new_file(path: str) -> Iterator[BinaryIO]:
    """Opens ``path`` for writing; a regular file that could not be finished is removed. Raises StorageError."""
    try:
        with open(path, "wb") as out:
            try:
                yield out
                out.flush()
            except BaseException:
                if stat.S_ISREG(os.fstat(out.fileno()).st_mode):
                    os.unlink(path)
                raise
    except OSError as error:
        raise _refused(path, error) from error


def file_bytes(image: Image) -> int:
    """Bytes that the image's regular files hold, hard links counted once. Walks the whole index."""
    sizes = {node.nid: node.size for _, node in image.index.walk() if stat.S_ISREG(node.mode)}
    return sum(sizes.values())


def device_bytes(image: Image, device: int, start: int, length: int) -> Iterator[bytes]:
    """Verified bytes of a device, in pieces that keep memory small."""
    reader = image.pack_reader(device)
    end = start + length
    while start < end:
        step = min(_PIECE, end - start)
        yield reader.read(start, step)
        start += step


def _allow_depth() -> None:
    """A descriptor is open for every directory on the way down: take as many as this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if hard != resource.RLIM_INFINITY else 1 << 16
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _refused(path: str, error: OSError) -> StorageError:
    hint = None
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "free some space; what was written is incomplete"
    elif error.errno == errno.EOPNOTSUPP:
        hint = "the file system cannot keep this attribute; choose another, or --tar"
    return StorageError(f"{path}: {error.strerror}", hint=hint)


class _Extraction:
    """One run. ``_links`` maps the nid of a file with several names to its first path."""

    def __init__(self, image: Image, path: str, top: int, task: Task) -> None:
        self._image = image
        self._path = path
        self._top = top
        self._task = task
        self._root = os.geteuid() == 0
        self._links: dict[int, bytes] = {}
        self._entries = 0
        self._bytes = 0
        self._skipped: dict[str, int] = {}

    def run(self) -> Extracted:
        self._directory(b"", self._image.index.root, self._top)
        notes = [f"{what} left out: {count} (only root may make them)" for what, count in self._skipped.items()]
        return Extracted(self._entries, self._bytes, notes)

    def _directory(self, path: bytes, node: Node, descriptor: int) -> None:
        """Fill the tree below an open directory, depth first, without recursion: a tree may be deep."""
        stack = [(path, node, descriptor, node.children())]
        try:
            while stack:
                path, node, descriptor, children = stack[-1]
                entry = next(children, None)
                if entry is None:
                    with self._blame(path):
                        self._attributes(node, descriptor)
                    stack.pop()
                    if descriptor != self._top:
                        os.close(descriptor)
                    continue
                name, child = entry
                here = path + b"/" + name if path else name
                self._entries += 1
                with self._blame(here):
                    if stat.S_ISDIR(child.mode):
                        os.mkdir(name, 0o700, dir_fd=descriptor)
                        opened = os.open(name, _DIRECTORY, dir_fd=descriptor)
                        stack.append((here, child, opened, child.children()))
                    else:
                        self._file(here, name, child, descriptor)
        finally:
            for _, _, descriptor, _ in stack:
                if descriptor != self._top:
                    os.close(descriptor)

    @contextmanager
    def _blame(self, path: bytes) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _refused(os.path.join(self._path, os.fsdecode(path)), error) from error

    def _file(self, path: bytes, name: bytes, node: Node, directory: int) -> None:
        if node.nlink > 1:
            first = self._links.setdefault(node.nid, path)
            if first is not path:
                self._link(first, name, directory)
                return
        kind = stat.S_IFMT(node.mode)
        if kind == stat.S_IFREG:
            self._regular(name, node, directory)
        elif kind == stat.S_IFLNK:
            os.symlink(node.readlink(), name, dir_fd=directory)
            if self._root:
                os.chown(name, node.uid, node.gid, dir_fd=directory, follow_symlinks=False)
            self._xattrs(node, b"/proc/self/fd/%d/%s" % (directory, name), follow=False)
            os.utime(name, ns=(node.mtime, node.mtime), dir_fd=directory, follow_symlinks=False)
        else:
            self._special(name, node, directory)

    def _link(self, first: bytes, name: bytes, directory: int) -> None:
        """One more name for a file made before, which is found again without following links."""
        parent, _, last = first.rpartition(b"/")
        opened = os.dup(self._top)
        try:
            for part in parent.split(b"/") if parent else ():
                below = os.open(part, _DIRECTORY, dir_fd=opened)
                os.close(opened)
                opened = below
            os.link(last, name, src_dir_fd=opened, dst_dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            if not self._root:
                return  # the first name was left out
            raise
        finally:
            os.close(opened)

    def _regular(self, name: bytes, node: Node, directory: int) -> None:
        descriptor = os.open(name, _NEW_FILE, 0o600, dir_fd=directory)
        try:
            inline = node.inline()
            if inline:
                _write(descriptor, inline, 0)
                self._task.advance(len(inline))
            elif node.size:
                os.ftruncate(descriptor, node.size)  # what is not written stays a hole
                self._data(node, descriptor)
            self._bytes += node.size
            self._attributes(node, descriptor)
        finally:
            os.close(descriptor)

    def _data(self, node: Node, descriptor: int) -> None:
        for offset, length, device, start in self._image.sparse_extents(node):
            if device is not None:
                for data in device_bytes(self._image, device, start, length):
                    _write(descriptor, data, offset)
                    offset += len(data)
            self._task.advance(length)

    def _special(self, name: bytes, node: Node, directory: int) -> None:
        kind = stat.S_IFMT(node.mode)
        if kind in (stat.S_IFCHR, stat.S_IFBLK) and not self._root:
            self._skip("devices")
            return
        os.mknod(name, kind | 0o600, node.rdev, dir_fd=directory)
        descriptor = os.open(name, _HANDLE, dir_fd=directory)
        try:
            if self._root:
                os.chown(name, node.uid, node.gid, dir_fd=directory, follow_symlinks=False)
            handle = b"/proc/self/fd/%d" % descriptor  # chmod(2) takes no O_PATH descriptor, and follows this link only
            os.chmod(handle, self._mode(node))
            self._xattrs(node, handle)
        finally:
            os.close(descriptor)
        os.utime(name, ns=(node.mtime, node.mtime), dir_fd=directory, follow_symlinks=False)

    def _attributes(self, node: Node, descriptor: int) -> None:
        """Owner, mode, extended attributes, times of an open file or directory, in an order where each survives."""
        if self._root:
            os.fchown(descriptor, node.uid, node.gid)
        os.fchmod(descriptor, self._mode(node))
        self._xattrs(node, descriptor)
        os.utime(descriptor, ns=(node.mtime, node.mtime))

    def _mode(self, node: Node) -> int:
        mode = stat.S_IMODE(node.mode)
        return mode if self._root else mode & ~(stat.S_ISUID | stat.S_ISGID)  # it would be another user's power

    def _xattrs(self, node: Node, target: int | bytes, *, follow: bool = True) -> None:
        for name, value in node.xattrs():
            if self._root or name.startswith(b"user."):
                os.setxattr(target, name, value, follow_symlinks=follow)
            else:
                self._skip("privileged extended attributes")

    def _skip(self, what: str) -> None:
        self._skipped[what] = self._skipped.get(what, 0) + 1


def _write(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        offset += written
        view = view[written:]
