"""Images at http(s) URLs: fetched only from hosts that the operator has named, and never from inside."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Collection, Mapping

import httpx

from router.http.addresses import is_public, resolve
from router.http.errors import InvalidFieldError
from shared.rpc.options import MAX_REQUEST_BYTES, MIB

FETCH_TIMEOUT_S = 10.0
MAX_FILE_BYTES = 25 * MIB
MAX_URLS = 16
# Of all requests together.
MAX_FETCHES = 32
TYPES = ("image/png", "image/jpeg", "image/webp")
PORTS = {"http": 80, "https": 443}


class RemoteImages:
    """Fetches from `hosts`, each `name` (ports 80 and 443) or `name:port`.

    A name is resolved once, all its addresses are checked, and the connection goes to the first: what the name resolves
    to a moment later changes nothing. No redirect is followed, no proxy is used, nothing is decompressed.
    """

    def __init__(
        self,
        hosts: Collection[str],
        *,
        resolve: Callable[[str, int], Awaitable[list[str]]] = resolve,
        allows: Callable[[str], bool] = is_public,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Opens no connection.

        Args:
            resolve: The addresses of a name at a port.
            allows: Whether an address may be connected to.
            tls: Whom to trust; the CAs of the public web by default.
        """
        self._hosts = frozenset(host.lower() for host in hosts)
        self._resolve = resolve
        self._allows = allows
        self._places = asyncio.Semaphore(MAX_FETCHES)
        # a connection that was made for one name must not serve another one at the same address
        limits = httpx.Limits(max_keepalive_connections=0)
        self._client = (
            httpx.AsyncClient(trust_env=False, timeout=FETCH_TIMEOUT_S, limits=limits, verify=tls or True)
            if hosts
            else None
        )

    async def fetch(self, urls: Mapping[str, str]) -> dict[str, bytes]:
        """The files at `urls`, each with the place in the request that names it first.

        Raises:
            InvalidFieldError: One may not be fetched, cannot be, or is no image; or all are too large together.
        """
        if len(urls) > MAX_URLS:
            raise InvalidFieldError(f"a request has at most {MAX_URLS} URLs to fetch", param=[*urls.values()][-1])
        left = _Allowance(MAX_REQUEST_BYTES)
        fetches = [asyncio.ensure_future(self._fetch(url, where, left)) for url, where in urls.items()]
        try:
            return dict(zip(urls, await asyncio.gather(*fetches), strict=True))
        finally:
            for fetch in fetches:
                fetch.cancel()
            await asyncio.gather(*fetches, return_exceptions=True)

    async def close(self) -> None:
        """Closes what is open."""
        if self._client is not None:
            await self._client.aclose()

    async def _fetch(self, text: str, where: str, left: _Allowance) -> bytes:
        client, url = self._client, _parsed(text, where)
        host, port = url.raw_host.decode().lower().rstrip("."), url.port or PORTS[url.scheme]
        named = f"{host}:{port}" in self._hosts or (host in self._hosts and port == PORTS[url.scheme])
        if client is None or not named:
            raise _refused("this server fetches nothing from there: send a data: URI", where, "URL_HOST")
        try:
            async with self._places:
                return await asyncio.wait_for(self._get(client, url, host, port, where, left), FETCH_TIMEOUT_S)
        except asyncio.TimeoutError:
            raise _refused(f"nothing was there within {FETCH_TIMEOUT_S:g} s", where, "URL_TIMEOUT") from None
        except (httpx.HTTPError, OSError):
            raise _refused("it cannot be fetched", where, "URL_UNREACHABLE") from None

    async def _get(
        self, client: httpx.AsyncClient, url: httpx.URL, host: str, port: int, where: str, left: _Allowance
    ) -> bytes:
        addresses = await self._resolve(host, port)
        if not addresses or not all(self._allows(address) for address in addresses):
            raise _refused("its address is not a public one", where, "URL_ADDRESS")
        request = client.build_request(
            "GET",
            url.copy_with(host=addresses[0]),
            headers={"host": url.netloc.decode(), "accept": ", ".join(TYPES), "accept-encoding": "identity"},
            # the certificate must be the name's
            extensions={"sni_hostname": host},
        )
        response = await client.send(request, stream=True)
        try:
            _check_head(response, where)
            return await _read(response, where, left)
        finally:
            await response.aclose()


class _Allowance:
    """Bytes that the images of one request may still have."""

    def __init__(self, num_bytes: int) -> None:
        self._left = num_bytes

    def take(self, num_bytes: int) -> bool:
        """Whether they were left."""
        self._left -= num_bytes
        return self._left >= 0


def _parsed(text: str, where: str) -> httpx.URL:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        raise _refused("this is no URL", where, "URL") from None
    if url.scheme not in PORTS or not url.host or url.userinfo:
        raise _refused("an image is at an http or https URL without a user, or in a data: URI", where, "URL")
    return url


def _check_head(response: httpx.Response, where: str) -> None:
    if response.status_code != httpx.codes.OK:
        raise _refused(f"its host answers with status {response.status_code}", where, "URL_STATUS")
    media_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in TYPES or response.headers.get("content-encoding", "identity") != "identity":
        raise _refused(f"it is none of {', '.join(TYPES)}", where, "URL_TYPE")


async def _read(response: httpx.Response, where: str, left: _Allowance) -> bytes:
    file = bytearray()
    async for piece in response.aiter_raw():
        file += piece
        if len(file) > MAX_FILE_BYTES or not left.take(len(piece)):
            raise _refused(f"an image has at most {MAX_FILE_BYTES // MIB} MiB", where, "URL_SIZE")
    return bytes(file)


def _refused(message: str, where: str, reason: str) -> InvalidFieldError:
    return InvalidFieldError(message, param=where, reason=reason)
