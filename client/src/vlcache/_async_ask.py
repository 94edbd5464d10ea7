"""One question, one call, for asyncio; the twin of `_ask`."""

from vlcache._async_client import AsyncClient
from vlcache._channel import DEFAULT_ADDRESS
from vlcache._completion import Completion
from vlcache._messages import ImageSource
from vlcache._settings import Compression, Sampling, Timeout, Tls


async def ask_async(
    question: str,
    *images: ImageSource,
    address: str = DEFAULT_ADDRESS,
    model: str = "",
    sampling: Sampling | None = None,
    compression: Compression | None = None,
    timeout: Timeout | None = None,
    token: str | None = None,
    tls: Tls | None = None,
) -> Completion:
    """Asks one question and waits for the answer, whose `str()` is its text.

    It connects anew each time: who asks often keeps an `AsyncClient`. Options and errors are those of `AsyncClient` and
    of its `stream`.
    """
    async with AsyncClient(address, timeout=timeout, token=token, tls=tls) as client:
        return await client.generate(question, images=images, model=model, sampling=sampling, compression=compression)
