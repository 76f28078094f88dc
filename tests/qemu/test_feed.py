"""Progress, for whoever iterates over it."""

import asyncio

from qmpblock.qemu.feed import Feed


async def shown(feed):
    return [one async for one in feed]


async def test_what_is_shown_is_seen_once_by_everybody():
    feed = Feed()
    both = [asyncio.create_task(shown(feed)) for _ in range(2)]
    await asyncio.sleep(0)
    for number in range(3):
        feed.show([number])
        await asyncio.sleep(0.001)
    feed.end()
    assert await asyncio.gather(*both) == [[[0], [1], [2]]] * 2


async def test_who_looks_late_sees_where_it_is_by_then():
    feed = Feed()
    feed.show([1])
    feed.show([2])
    feed.end()
    assert await shown(feed) == [[2]]
    assert await shown(ended()) == []


def ended():
    feed = Feed()
    feed.end()
    feed.end()
    return feed
