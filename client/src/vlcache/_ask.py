"""One question, one call. `_async_ask` holds its asyncio twin."""

from vlcache._channel import DEFAULT_ADDRESS
from vlcache._client import Client
from vlcache._completion import Completion
from vlcache._messages import ImageSource
from vlcache._settings import Compression, Sampling, Timeout, Tls


def ask(
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

    print(vlcache.ask("What is in the picture?", "photo.jpg"))

    It connects anew each time: who asks often keeps a `Client`. Options and errors are those of `Client` and of its
    `stream`.
    """
    with Client(address, timeout=timeout, token=token, tls=tls) as client:
        return client.generate(question, images=images, model=model, sampling=sampling, compression=compression)
