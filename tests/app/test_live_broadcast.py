"""One stream, many viewers: what a slow one misses is its own loss, and states arrive."""

import asyncio
import contextlib
import json
import socket
import threading
from contextlib import aclosing

import pytest

from packforcing.app.server.broadcast import LATEST, Broadcast, Header, bound_unsent

HEADER = Header("live_1", "video/mp4", b"header")


def make_broadcast():
    """Return a broadcast and the state that it describes, which counts."""
    state = {"count": 0}

    def describe(*, blocks=False):
        return {**state, **({"blocks": []} if blocks else {})}

    return Broadcast(describe, lambda: None), state


def publish(broadcast, *numbers, header=HEADER):
    for number in numbers:
        broadcast.publish(header, {"index": number}, b"%d" % number)


async def take(messages, count):
    """Return the next messages of a viewer: their fields, and the data of blocks."""
    taken = []
    for _ in range(count):
        async with asyncio.timeout(10):
            message = await anext(messages)
        taken.append(
            {**json.loads(message.text), **({"data": message.data} if message.data else {})}
        )
    return taken


def test_a_slow_viewer_loses_its_own_fragments_alone():
    async def watch():
        broadcast, _ = make_broadcast()
        broadcast.begin(HEADER)
        async with aclosing(broadcast.follow()) as slow, aclosing(broadcast.follow()) as quick:
            for viewer in slow, quick:
                kinds = [message["type"] for message in await take(viewer, 2)]
                assert kinds == ["state", "header"]
            seen = []
            for number in range(10):
                publish(broadcast, number)
                seen += await take(quick, 1)
            assert [(m["index"], m["data"], m["lost"]) for m in seen] == [
                (n, b"%d" % n, 0) for n in range(10)
            ]
            late = await take(slow, LATEST)
            assert [(m["index"], m["lost"]) for m in late] == [
                (n, 10 - LATEST) for n in range(10 - LATEST, 10)
            ]

    asyncio.run(watch())


def test_a_viewer_who_waits_gets_each_block_from_another_thread():
    async def watch():
        broadcast, _ = make_broadcast()
        broadcast.begin(HEADER)
        async with aclosing(broadcast.follow()) as messages:
            await take(messages, 2)
            for number in range(3):
                waiting = asyncio.create_task(take(messages, 1))
                await asyncio.sleep(0)  # it waits now
                await asyncio.to_thread(publish, broadcast, number)
                assert (await waiting)[0]["index"] == number

    asyncio.run(watch())


def test_a_new_viewer_begins_with_the_latest_fragment():
    async def watch():
        broadcast, _ = make_broadcast()
        broadcast.begin(HEADER)
        publish(broadcast, *range(7))
        async with aclosing(broadcast.follow()) as messages:
            state, header, block = await take(messages, 3)
        assert state["blocks"] == []
        assert header == {"type": "header", "id": "live_1", "mime": "video/mp4", "data": b"header"}
        assert block == {"type": "block", "index": 6, "lost": 0, "data": b"6"}

    asyncio.run(watch())


def test_many_changes_are_one_state_and_the_latest_is_never_lost():
    async def watch():
        broadcast, state = make_broadcast()
        async with aclosing(broadcast.follow()) as messages:
            assert (await take(messages, 1))[0]["count"] == 0

            def change():
                for _ in range(1000):
                    state["count"] += 1
                    broadcast.announce()

            thread = threading.Thread(target=change)
            thread.start()
            thread.join()
            assert await take(messages, 1) == [{"type": "state", "count": 1000}]
            broadcast.end()
            assert [message async for message in messages] == []

    asyncio.run(watch())


def test_a_new_video_comes_with_its_state_and_header_and_nothing_of_the_one_before():
    async def watch():
        broadcast, _ = make_broadcast()
        broadcast.begin(HEADER)
        async with aclosing(broadcast.follow()) as messages:
            await take(messages, 2)
            publish(broadcast, 0, 1)
            other = Header("live_2", "video/mp4", b"other")
            broadcast.begin(other)
            publish(broadcast, 2)  # of the video before, which was encoded meanwhile
            publish(broadcast, 0, header=other)
            state, header, block = await take(messages, 3)
            assert (state["type"], header["id"], block["index"], block["lost"]) == (
                "state", "live_2", 0, 0,
            )  # fmt: skip
        assert broadcast.viewers == 0

    asyncio.run(watch())


@pytest.mark.skipif(not hasattr(socket, "TCP_NOTSENT_LOWAT"), reason="the system has no such bound")
def test_the_system_holds_little_of_what_is_not_taken():
    """By default, it takes megabytes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        bound_unsent(listener)
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
            accepted.setblocking(False)
            sent = 0
            with contextlib.suppress(BlockingIOError):
                while sent < 1 << 24:
                    sent += accepted.send(bytes(1 << 12))
    assert sent < 1 << 20
