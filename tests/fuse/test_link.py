"""The server's side of its connection with the supervisor, which may go and come again at any time."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import trio
from lazykit import WAIT

from erofsgen.errors import BusyError, RemoteError
from fusefallback.link import Link
from fusefallback.plane import SOCKET


def test_a_link_finds_no_supervisor(tmp_path: Path) -> None:
    with pytest.raises(BusyError, match="no daemon is running"):
        trio.run(Link(tmp_path, "m").connect)


class Supervisor:
    """Listens where a supervisor would, and says what the test wants."""

    def __init__(self, root: Path) -> None:
        self.listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listening.bind(os.fspath(root / SOCKET))
        self.listening.listen()

    async def accept(self) -> socket.socket:
        end = await trio.to_thread.run_sync(lambda: self.listening.accept()[0])
        assert await self.hear(end) == {"do": "hello", "mount": "m"}
        self.say(end, {"deadline": 0.2, "read_ahead": 5})
        return end

    async def hear(self, end: socket.socket) -> Any:
        end.settimeout(WAIT)
        return json.loads(await trio.to_thread.run_sync(end.recv, 1 << 16))

    def say(self, end: socket.socket, message: dict[str, Any]) -> None:
        end.send(json.dumps(message).encode())


def test_what_waits_is_told_to_the_next_supervisor(tmp_path: Path) -> None:
    async def scene() -> None:
        supervisor = Supervisor(tmp_path)
        link = Link(tmp_path, "m")
        results: dict[str, BaseException | None] = {}

        async def fill(name: str, offset: int) -> None:
            try:
                await link.fill("p", offset, 10)
                results[name] = None
            except RemoteError as error:
                results[name] = error

        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as both:
                both.start_soon(link.connect)
                end = await supervisor.accept()
            nursery.start_soon(link.run)
            nursery.start_soon(fill, "first", 0)
            nursery.start_soon(fill, "second", 50)
            asked = [await supervisor.hear(end), await supervisor.hear(end)]
            assert sorted(message["offset"] for message in asked) == [0, 50]
            supervisor.say(end, {"key": 12345, "error": None})
            key = next(message["key"] for message in asked if message["offset"] == 50)
            supervisor.say(end, {"key": key, "error": "no store"})
            while "second" not in results:
                await trio.sleep(0.01)
            assert str(results["second"]) == "no store"
            end.close()
            end = await supervisor.accept()
            again = await supervisor.hear(end)
            assert again["offset"] == 0
            supervisor.say(end, {"key": again["key"], "error": None})
            while "first" not in results:
                await trio.sleep(0.01)
            assert results["first"] is None
            end.close()
            while link._channel is not None:
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        supervisor.listening.close()

    async def timely() -> None:
        with trio.fail_after(WAIT):
            await scene()

    trio.run(timely)


def test_a_link_whose_supervisor_is_gone_for_good(tmp_path: Path) -> None:
    async def scene() -> None:
        supervisor = Supervisor(tmp_path)
        link = Link(tmp_path, "m")
        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as both:
                both.start_soon(link.connect)
                end = await supervisor.accept()
            nursery.start_soon(link.run)
            supervisor.listening.close()
            end.close()
            for _ in range(3):
                with trio.fail_after(WAIT), pytest.raises(RemoteError, match="no daemon is running"):
                    await link.fill("p", 0, 10)
                link.ahead("p", 0, 10)
            nursery.cancel_scope.cancel()

    trio.run(scene)
