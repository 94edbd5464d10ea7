"""Many requests at once, a few at a time, for asyncio; the twin of `_many`."""

import asyncio
from collections.abc import Callable, Iterable, Iterator

from vlcache._async_stream import AsyncStream
from vlcache._completion import Completion
from vlcache._many import FAILURES, OnError, check_many
from vlcache._progress import Advance, progress_bar
from vlcache._request import Request


async def answer_many_async(
    send: Callable[[Request], AsyncStream],
    requests: Iterable[Request],
    *,
    concurrency: int,
    progress: bool,
    on_error: OnError,
) -> list[Completion | Exception]:
    """The answers in the order of the requests. See `AsyncClient.generate_many`."""
    check_many(concurrency, on_error)
    asked = list(requests)
    answers: dict[int, Completion | Exception] = {}
    turns = iter(enumerate(asked))

    async def work(turns: Iterator[tuple[int, Request]], advance: Advance) -> None:
        for at, request in turns:
            answers[at] = await _answer(send, request, returned=on_error == "return")
            advance()

    with progress_bar("requests", len(asked), shown=progress) as advance:
        workers = [asyncio.create_task(work(turns, advance)) for _ in range(min(concurrency, len(asked)))]
        try:
            await asyncio.gather(*workers)
        finally:
            # after an error, or when the caller is cancelled, the others are in the middle of something
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
    return [answers[at] for at in range(len(asked))]


async def _answer(
    send: Callable[[Request], AsyncStream], request: Request, *, returned: bool
) -> Completion | Exception:
    """The whole answer. An error of this request is raised, or `returned` in its place."""
    try:
        async with send(request) as stream:
            return await stream.result()
    except FAILURES as failure:
        if returned:
            return failure
        raise
