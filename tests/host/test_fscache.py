"""The fscache plane without a kernel that has it: messages, whatever they are, through a device of the test's."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from handmade import CHUNK, ImageMaker, Sample, make_wide
from hypothesis import given
from hypothesis import strategies as st

from erofsgen.errors import ErofsgenError, UnsupportedError, UsageError
from erofsgen.host.cache.cache import HostCache
from erofsgen.host.cache.objects import Key, Objects, is_ours
from erofsgen.store.directory import DirectoryStore
from fscache_daemon import protocol
from fscache_daemon.device import Device, Limits
from fscache_daemon.plane import Plane
from fscache_daemon.recover import recover, recovered

VOLUME = "erofs,erofsgen"


def open_message(number: int, object_id: int, cookie: str, descriptor: int, volume: str = VOLUME) -> bytes:
    keys = volume.encode() + b"\0" + cookie.encode()
    body = struct.pack("=IIII", len(volume) + 1, len(cookie), descriptor, 0) + keys
    return struct.pack("=IIII", number, 0, 16 + len(body), object_id) + body


def read_message(number: int, object_id: int, offset: int, length: int) -> bytes:
    return struct.pack("=IIIIQQ", number, 2, 32, object_id, offset, length)


def close_message(object_id: int) -> bytes:
    return struct.pack("=IIII", 0, 1, 16, object_id)


class FakeDevice(Device):
    """What the kernel would be told is recorded; objects are plain files, written like the kernel's."""

    def __init__(self, place: Path) -> None:
        super().__init__(os.open(place / "device", os.O_RDWR | os.O_CREAT))
        self.place = place
        self.messages: list[bytes | OSError] = []
        self.opens: dict[int, int] = {}
        self.completed: list[int] = []
        self.restored = 0
        self.in_use: set[Path] = set()

    def read(self) -> bytes:
        message = self.messages.pop(0) if self.messages else b""
        if isinstance(message, OSError):
            raise message
        return message

    def opened(self, message: int, size: int) -> bool:
        self.opens[message] = size
        return True

    def complete(self, descriptor: int, message: int) -> None:
        self.completed.append(message)

    def restore(self) -> bool:
        self.restored += 1
        return True

    def cull(self, file: Path) -> bool:
        if file in self.in_use:
            return False
        file.unlink()
        return True


class FakeSupervisor:
    def __init__(self) -> None:
        self.wanted: list[tuple[int, str, int, int]] = []
        self.errors: list[str] = []
        self.forgotten: list[str] = []
        self.later: list[Callable[[], None]] = []
        self.freed = 0

    def missing(self, key: int, pack: str, offset: int, length: int) -> None:
        self.wanted.append((key, pack, offset, length))

    def touched(self, pack: str, offset: int, length: int, *more: object) -> None:
        pass

    def ahead(self, pack: str, offset: int, length: int) -> None:
        pass

    def forget(self, pack: str) -> None:
        self.forgotten.append(pack)

    def failed(self, error: str, pack: str | None = None) -> None:
        self.errors.append(error)

    def gave_back(self, size: int) -> None:
        self.freed += size

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        self.later.append(call)

    def watch(self, descriptor: int, ready: Callable[[], None], events: int) -> None:
        os.close(descriptor)


class Kernel:
    """The plane, what it talks to, and objects to fill."""

    def __init__(self, place: Path) -> None:
        self.root = place / "root"
        self.cache = HostCache(self.root)
        self.device = FakeDevice(place)
        self.objects = Objects(self.cache.layout)
        self.objects.create()
        self.supervisor = FakeSupervisor()
        self.plane = Plane(self.device, root=self.root, read_ahead=0)
        self.plane.attach(self.supervisor)  # type: ignore[arg-type]
        self.files: dict[int, Path] = {}

    def tell(self, *messages: bytes | OSError) -> None:
        self.device.messages += messages
        self.plane.serve()

    def object(self, cookie: str, size: int, name: str = "00") -> Path:
        path = self.objects.directory / "cache" / f"I{VOLUME}" / f"@{name}" / f"D{cookie}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.touch()
            os.truncate(path, size)
        return path

    def open(self, number: int, object_id: int, cookie: str, size: int = 1 << 20, volume: str = VOLUME) -> int:
        """Returns the descriptor that the kernel would have made."""
        descriptor = os.open(self.object(cookie, size), os.O_WRONLY)
        os.set_inheritable(descriptor, True)
        self.tell(open_message(number, object_id, cookie, descriptor, volume))
        return descriptor


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    made = Kernel(tmp_path)
    yield made
    made.tell(*(close_message(number) for number in list(made.plane._open)))


@pytest.fixture
def pulled(kernel: Kernel, maker: ImageMaker) -> Sample:
    wide = make_wide(maker)
    kernel.cache.add(wide.image)
    return wide


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


# --- messages --------------------------------------------------------------------------------------------------------


@given(
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.text(st.characters(codec="ascii", exclude_characters="\0"), min_size=1, max_size=200),
    st.text(st.characters(codec="ascii"), min_size=1, max_size=200),
    st.integers(0, 2**31 - 1),
)
def test_opens_are_read_as_they_are_written(number: int, object_id: int, volume: str, cookie: str, fd: int) -> None:
    expected = protocol.Open(number, object_id, volume, cookie, fd)
    assert protocol.parse(open_message(number, object_id, cookie, fd, volume)) == expected


@given(st.binary(max_size=1100))
def test_any_bytes_are_some_message(data: bytes) -> None:
    protocol.parse(data)


@given(st.integers(0, 200), st.integers(0, 255), st.data())
def test_a_damaged_open_is_never_taken_for_another(at: int, value: int, data: st.DataObject) -> None:
    """Whatever comes out, an OPEN that is not answered would hang who mounts: it is refused under its own id."""
    message = bytearray(open_message(7, 3, "a" * 64, 9))
    cut = data.draw(st.integers(0, len(message)))
    if at < len(message):
        message[at] = value
    parsed = protocol.parse(bytes(message[:cut]))
    if isinstance(parsed, protocol.Malformed) and cut >= 16 and message[4:8] == b"\0\0\0\0":
        assert parsed.message == int.from_bytes(message[:4], "little")


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\0" * 15,
        struct.pack("=IIII", 1, 77, 16, 1),
        struct.pack("=IIII", 1, 2, 16, 1),
        struct.pack("=IIII", 1, 2, 4000, 1) + bytes(16),
        struct.pack("=IIII", 1, 0, 16, 1),
        struct.pack("=IIII", 1, 1, 4096, 1) + bytes(4080),
    ],
    ids=["none", "short", "unknown", "no range", "longer than it is", "no keys", "oversized"],
)
def test_what_is_no_message_hurts_nobody(kernel: Kernel, pulled: Sample, message: bytes) -> None:
    kernel.tell(message or b"\1", open_message(5, 2, "wide", os.open(kernel.object("wide", 8192), os.O_WRONLY)))
    assert kernel.device.opens[5] == 8192


def test_a_request_that_the_kernel_itself_gave_up(kernel: Kernel, pulled: Sample) -> None:
    kernel.tell(OSError(errno.EMFILE, "Too many open files"))
    kernel.open(5, 2, "wide")
    assert kernel.device.opens[5] == 8192


def test_an_open_with_keys_that_are_too_long_is_refused(kernel: Kernel) -> None:
    descriptor = os.open(kernel.object("x", 1), os.O_WRONLY)
    message = bytearray(open_message(6, 2, "x" * 64, descriptor))
    message[20:24] = struct.pack("=I", 65)
    kernel.tell(bytes(message))
    assert kernel.device.opens == {6: -errno.EINVAL}
    assert not is_open(descriptor)


# --- opening ---------------------------------------------------------------------------------------------------------


def test_opens_are_answered_with_sizes(kernel: Kernel, pulled: Sample) -> None:
    digest = pulled.image.digest.removeprefix("sha256:")
    fsids = ["wide", digest, digest[:12], f"{digest[:20]}.7"]
    for number, cookie in enumerate([*fsids, pulled.packs[0].hex]):
        descriptor = kernel.open(number, number + 100, cookie)
        assert not os.get_inheritable(descriptor)
    assert [kernel.device.opens[number] for number in range(5)] == [8192] * 4 + [96 * CHUNK]


@pytest.mark.parametrize(
    ("cookie", "volume", "number"),
    [
        ("nobody-pulled-this", VOLUME, errno.ENOENT),
        ("0" * 64, VOLUME, errno.ENOENT),
        ("../../etc/passwd", VOLUME, errno.ENOENT),
        ("wide", "afs,somebody", errno.ENOENT),
        ("no digest", VOLUME, errno.ENOENT),
    ],
)
def test_what_is_not_ours_is_refused(
    kernel: Kernel, pulled: Sample, cookie: str, volume: str, number: int, tmp_path: Path
) -> None:
    descriptor = os.open(tmp_path / "device", os.O_WRONLY)
    kernel.tell(open_message(3, 4, cookie, descriptor, volume))
    assert kernel.device.opens == {3: -number}
    assert not is_open(descriptor)
    assert kernel.supervisor.errors


def test_an_image_with_holes_before_data_is_refused(kernel: Kernel, maker: ImageMaker) -> None:
    wide = make_wide(maker)
    one = wide.files["one"]
    assert isinstance(one, bytes)
    kernel.cache.add(maker.image("holes", {"file": bytes(CHUNK) + one}, wide.packs))
    kernel.open(3, 4, "holes")
    assert kernel.device.opens == {3: -errno.EOPNOTSUPP}


def test_a_name_that_several_stores_use_is_refused(kernel: Kernel, pulled: Sample, tmp_path: Path) -> None:
    kernel.cache.add(make_wide(ImageMaker(DirectoryStore(tmp_path / "second")), seed=9).image)
    kernel.open(3, 4, "wide")
    assert kernel.device.opens == {3: -errno.ENOENT}
    assert "several images" in kernel.supervisor.errors[0]


def test_another_images_index_is_emptied(kernel: Kernel, pulled: Sample, maker: ImageMaker) -> None:
    kernel.open(3, 4, "wide", 8192)
    kernel.tell(read_message(4, 4, 0, 4096), close_message(4))
    file = kernel.object("wide", 8192)
    index = kernel.cache.image_path(pulled.image.digest, "erofs").read_bytes()
    assert file.read_bytes() == index
    kernel.open(5, 5, "wide")
    assert file.read_bytes() == index, "it is the same image's still"
    kernel.cache.add(maker.image("wide", {"one": pulled.files["two"]}, pulled.packs))
    kernel.open(6, 6, "wide")
    assert file.read_bytes() == bytes(8192)


# --- reading ---------------------------------------------------------------------------------------------------------


def test_a_pack_is_asked_of_the_worker_and_answered_once(kernel: Kernel, pulled: Sample) -> None:
    pack = pulled.packs[0].hex
    kernel.open(1, 9, pack, 96 * CHUNK)
    kernel.tell(read_message(2, 9, 4 * CHUNK, CHUNK), read_message(2, 9, 4 * CHUNK, CHUNK))
    assert kernel.supervisor.wanted == [(2, f"{pack}:9", 4 * CHUNK, CHUNK)]
    assert kernel.device.completed == []
    introduction = kernel.plane.introduce(f"{pack}:9")
    assert introduction is not None
    target = kernel.cache.open_object(
        pulled.image.packs[0], Path(introduction.facts["map"]), os.dup(introduction.descriptor)
    )
    one = pulled.files["one"]
    assert isinstance(one, bytes)
    target.write_frame(1, one[4 * CHUNK : 8 * CHUNK])
    target.close()
    kernel.plane.answer(2, failed=False)
    kernel.plane.answer(2, failed=False)
    assert kernel.device.completed == [2]
    with kernel.object(pack, 0).open("rb") as file:
        file.seek(4 * CHUNK)
        assert file.read(4 * CHUNK) == one[4 * CHUNK : 8 * CHUNK]
    kernel.tell(read_message(3, 9, 4 * CHUNK, CHUNK))
    assert kernel.device.completed == [2, 3], "it is there: nobody has to be asked"


def test_marks_of_what_the_object_lacks_are_taken_back(kernel: Kernel, pulled: Sample) -> None:
    """The kernel made a new object, or lost one with the power."""
    pack = pulled.packs[0].hex
    kernel.open(1, 9, pack, 96 * CHUNK)
    found = kernel.plane._open[9]
    found.presence.mark_written(1)  # type: ignore[union-attr]
    found.presence.mark_written(3)  # type: ignore[union-attr]
    kernel.tell(read_message(2, 9, 4 * CHUNK, CHUNK))
    assert len(kernel.supervisor.wanted) == 1
    assert found.presence.count() == 0  # type: ignore[union-attr]


@pytest.mark.parametrize(("offset", "length"), [(8192, 4096), (0, 12288), (2**63, 4096), (0, 0), (4096, 2**64 - 4096)])
def test_a_read_outside_of_the_object_fails(kernel: Kernel, pulled: Sample, offset: int, length: int) -> None:
    kernel.open(1, 9, "wide", 8192)
    kernel.tell(read_message(2, 9, offset, length))
    assert kernel.device.completed == [2]
    assert "outside" in kernel.supervisor.errors[0]


def test_a_read_of_what_is_not_open_has_the_kernel_tell_again(kernel: Kernel, pulled: Sample) -> None:
    before = kernel.device.restored
    kernel.tell(read_message(2, 9, 0, 4096), read_message(3, 9, 0, 4096))
    (again,) = kernel.supervisor.later
    again()
    assert kernel.device.restored == before + 1
    assert kernel.device.completed == []


def test_a_descriptor_that_somebody_has_closed(kernel: Kernel, pulled: Sample) -> None:
    """An index that cannot be written: the reader gets EIO, the next image is served."""
    descriptor = kernel.open(1, 9, "wide", 8192)
    os.dup2(os.open(os.devnull, os.O_RDONLY), descriptor)
    kernel.tell(read_message(2, 9, 0, 4096))
    assert kernel.device.completed == [2]
    assert kernel.supervisor.errors
    kernel.open(3, 10, "wide", 8192)
    assert kernel.device.opens[3] == 8192


def test_closing_lets_everything_go(kernel: Kernel, pulled: Sample) -> None:
    pack = pulled.packs[0].hex
    descriptor = kernel.open(1, 9, pack, 96 * CHUNK)
    kernel.tell(read_message(2, 9, 0, 4096), close_message(9), close_message(9))
    assert not is_open(descriptor)
    assert kernel.supervisor.forgotten == [f"{pack}:9"]
    kernel.plane.answer(2, failed=True)
    assert kernel.device.completed == []
    assert kernel.plane.introduce(f"{pack}:9") is None


# --- room ------------------------------------------------------------------------------------------------------------


def fill(kernel: Kernel, wide: Sample) -> None:
    """An object for each pack, closed, the first used longest ago."""
    for number, pack in enumerate(wide.image.packs):
        kernel.open(number, number + 1, pack.hex, pack.device_size)
        path = kernel.object(pack.hex, pack.device_size)
        path.write_bytes(os.urandom(pack.device_size))
        kernel.tell(close_message(number + 1))
        os.utime(kernel.objects.map(Key(VOLUME, pack.hex)), (number, number))


def test_the_least_recently_used_goes_first(kernel: Kernel, pulled: Sample) -> None:
    fill(kernel, pulled)
    freed = kernel.plane.cull(1, ())
    assert freed >= 96 * CHUNK
    assert [stored.of for stored in kernel.objects.oldest(())] == [pack.hex for pack in pulled.packs[1:]]
    assert not kernel.objects.map(Key(VOLUME, pulled.packs[0].hex)).exists()


def test_what_is_open_pinned_or_in_use_stays(kernel: Kernel, pulled: Sample) -> None:
    fill(kernel, pulled)
    first, second, third = (pack.hex for pack in pulled.packs)
    kernel.open(9, 9, first, 96 * CHUNK)
    kernel.device.in_use.add(kernel.object(second, 0))
    kernel.plane.cull(None, {third})
    assert {stored.of for stored in kernel.objects.all()} == {first, second, third}
    kernel.cache.layout.pin(pulled.image.digest, on=True)
    kernel.device.in_use.clear()
    kernel.plane.cull(None, None)
    assert {stored.of for stored in kernel.objects.all()} == {first, second, third}
    kernel.plane.cull(None, ())
    assert {stored.of for stored in kernel.objects.all()} == {first}


def test_the_limit_counts_objects(kernel: Kernel, pulled: Sample) -> None:
    before = kernel.cache.layout.allocated()
    fill(kernel, pulled)
    assert kernel.cache.layout.allocated() - before >= 242 * CHUNK
    assert kernel.cache.cull(None, ()) >= 242 * CHUNK
    assert kernel.cache.layout.allocated() <= before + 65536


# --- another boot ----------------------------------------------------------------------------------------------------


def another_boot(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(16)
        file.write(b"another boot's !")


def test_objects_of_another_boot_are_compared(kernel: Kernel, pulled: Sample) -> None:
    pack = pulled.image.packs[0]
    key = Key(VOLUME, pack.hex)
    kernel.open(1, 1, pack.hex, pack.device_size)
    found = kernel.plane._open[1]
    path = kernel.object(pack.hex, pack.device_size)
    one = pulled.files["one"]
    assert isinstance(one, bytes)
    with path.open("r+b") as file:
        for frame in (0, 1, 2, 5):
            file.seek(frame * 4 * CHUNK)
            file.write(one[frame * 4 * CHUNK : (frame + 1) * 4 * CHUNK])
        file.seek(4 * CHUNK + 100)
        file.write(b"lost with the power")
    for frame in (0, 1, 2):
        found.presence.mark_written(frame)  # type: ignore[union-attr]
    kernel.tell(close_message(1))
    another_boot(kernel.objects.map(key))
    recover(kernel.cache)
    data = path.read_bytes()
    for frame in range(24):
        part = data[frame * 4 * CHUNK : (frame + 1) * 4 * CHUNK]
        assert part == (one[frame * 4 * CHUNK : (frame + 1) * 4 * CHUNK] if frame in (0, 2) else bytes(4 * CHUNK)), (
            frame
        )
    assert os.stat(path).st_blocks * 512 < 12 * CHUNK, "what is wrong, or not counted, is a hole"


def test_an_object_whose_map_is_damaged_is_emptied(kernel: Kernel, pulled: Sample) -> None:
    fill(kernel, pulled)
    for pack in pulled.packs:
        kernel.objects.map(Key(VOLUME, pack.hex)).write_bytes(b"no map")
    recover(kernel.cache)
    assert all(stored.size == 0 for stored in kernel.objects.all())


def test_a_note_that_power_has_emptied(kernel: Kernel, pulled: Sample) -> None:
    """Whose index the object is nobody knows: it is made anew, and stands in nothing's way."""
    kernel.open(1, 1, "wide", 8192)
    kernel.tell(read_message(2, 1, 0, 4096), close_message(1))
    note = kernel.objects.index(Key(VOLUME, "wide"))
    note.write_bytes(b"")
    recovered(kernel.root, kernel.objects)
    kernel.objects.cleaned()
    assert not note.exists()
    assert kernel.objects.find(Key(VOLUME, "wide")) is None


def test_what_a_crash_leaves_is_removed(kernel: Kernel, pulled: Sample) -> None:
    fill(kernel, pulled)
    kernel.object("stranger", 100, "07").write_bytes(b"not ours")
    loose = kernel.objects.map(Key(VOLUME, "ab" * 32))
    loose.write_bytes(b"a record without an object")
    kernel.objects.cleaned()
    assert not loose.exists()
    assert len(list(kernel.objects.all())) == 3
    assert not (kernel.objects.directory / "cache" / f"I{VOLUME}" / "@07" / "Dstranger").exists()


# --- supervisors -----------------------------------------------------------------------------------------------------


def test_a_kernel_that_cannot_restore_gets_no_standby(tmp_path: Path) -> None:
    """Before 6.8 and 6.1.95: who would go on with the device could not learn what is waited for."""

    class Older(FakeDevice):
        def restore(self) -> bool:
            return False

    assert Plane(FakeDevice(tmp_path), root=tmp_path / "root").survives
    assert not Plane(Older(tmp_path), root=tmp_path / "root").survives


def test_a_supervisor_that_ends_lets_the_kernel_put_objects_away(kernel: Kernel, pulled: Sample) -> None:
    done: list[list[Path]] = []
    pack = pulled.packs[0].hex
    kernel.open(1, 1, pack, 96 * CHUNK)
    kernel.plane.close_for_good([], done.append)
    assert done == [], "an object is open"
    kernel.tell(read_message(2, 1, 0, 4096))
    assert kernel.device.completed == [2], "what is read now fails at once"
    descriptor = kernel.open(3, 2, "wide", 8192)
    assert kernel.device.opens[3] == -errno.ENOENT
    assert not is_open(descriptor)
    kernel.tell(close_message(1))
    kernel.supervisor.later.pop()()
    assert done == [[]]


# --- limits ----------------------------------------------------------------------------------------------------------


@given(*[st.integers(-5, 120)] * 3)
def test_limits_are_in_order(run: int, cull: int, stop: int) -> None:
    if 0 <= stop < cull < run < 100:
        Limits(run, cull, stop)
    else:
        with pytest.raises(UsageError):
            Limits(run, cull, stop)


@given(st.text(max_size=210))
def test_names_of_ours_are_file_names(name: str) -> None:
    if is_ours(Key(VOLUME, name)):
        assert name
        assert not set(name) & set("/ \n\0")


def test_a_machine_without_the_device(tmp_path: Path) -> None:
    if os.path.exists("/dev/cachefiles"):
        pytest.skip("this kernel has cachefiles")
    with pytest.raises(ErofsgenError) as caught:
        Device.bind(tmp_path, Limits())
    assert isinstance(caught.value, UnsupportedError)
    assert "CONFIG_CACHEFILES_ONDEMAND" in str(caught.value.hint)
