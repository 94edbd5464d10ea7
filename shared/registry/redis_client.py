"""From `redis://` and `rediss://` to a client that waits for nothing for long."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from shared.errors import UnavailableError

Result = TypeVar("Result")

PASSWORD_VARIABLE = "VLCACHE_REDIS_PASSWORD"  # noqa: S105 - the name, not the secret
DEFAULT_PREFIX = "vlcache:"
# The prefix stands in a SCAN pattern, so nothing in it may be a wildcard.
_PREFIX = re.compile(r"[A-Za-z0-9:._-]{1,64}")
TLS_OPTIONS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
# One connection attempt, and one whole call with its second attempt.
SOCKET_TIMEOUT_S, CALL_TIMEOUT_S = 2.0, 3.0


@dataclass(frozen=True, kw_only=True)
class RedisLocation:
    """`redis://[user[:password]@]host[:port][/db][?prefix=...]`; `rediss://` is TLS and takes certificate files."""

    host: str
    port: int
    db: int
    username: str | None
    password: str | None = field(repr=False)
    prefix: str
    tls: dict[str, Any]
    """Arguments of redis-py; empty without TLS."""

    @classmethod
    def parse(cls, location: str) -> RedisLocation:
        """Reads a location; a password that is not in it is taken from the environment (`PASSWORD_VARIABLE`).

        Raises:
            ValueError: Something in it cannot be read. The text never repeats a password.
        """
        url = _split(location)
        options = _options(url)
        prefix = options.pop("prefix", DEFAULT_PREFIX)
        if not _PREFIX.fullmatch(prefix):
            raise ValueError("the prefix of a Redis location has 1 to 64 letters, digits, or any of : . _ -")
        password = unquote(url.password) if url.password is not None else os.environ.get(PASSWORD_VARIABLE)
        return cls(
            host=url.hostname or "",
            port=url.port or 6379,
            db=_database(url),
            username=unquote(url.username) if url.username else None,
            password=password or None,
            prefix=prefix,
            tls={"ssl": True, "ssl_check_hostname": True, **options} if url.scheme == "rediss" else {},
        )

    @property
    def entries(self) -> str:
        """What every key of an entry begins with."""
        return f"{self.prefix}worker:"

    def connect(self) -> Redis:
        """A client that connects when it is first used.

        A connection that a restarted Redis has forgotten fails once, hence the one retry.
        """
        return Redis(
            host=self.host,
            port=self.port,
            db=self.db,
            username=self.username,
            password=self.password,
            socket_timeout=SOCKET_TIMEOUT_S,
            socket_connect_timeout=SOCKET_TIMEOUT_S,
            retry=Retry(NoBackoff(), 1),
            # no HELLO and no CLIENT SETINFO: a user that may do little is not refused at the door
            protocol=2,
            driver_info=None,
            **self.tls,
        )


async def bounded(work: Coroutine[Any, Any, Result]) -> Result:
    """The result of calls on a client.

    Raises:
        UnavailableError: Redis is gone, refuses, makes no sense, or takes longer than `CALL_TIMEOUT_S`.
    """
    try:
        return await asyncio.wait_for(work, CALL_TIMEOUT_S)
    except UnavailableError:
        raise
    except Exception as error:
        # of any kind: what is no Redis makes redis-py stumble in many ways, and nobody may stumble with it
        said = str(error) or "no answer in time"
        raise UnavailableError(f"Redis: {type(error).__name__}: {said}", reason="REGISTRY") from error


def _split(location: str) -> SplitResult:
    try:
        url = urlsplit(location)
        # parsed on access
        readable = bool(url.hostname) and url.port != 0 and not url.fragment
    except ValueError:
        readable = False
    if not readable:
        raise ValueError("a Redis location is redis://[user[:password]@]host[:port][/db], with %xx for special signs")
    return url


def _database(url: SplitResult) -> int:
    number = url.path.strip("/") or "0"
    if not (number.isascii() and number.isdigit() and len(number) <= 4):
        raise ValueError("the path of a Redis location is the number of a database")
    return int(number)


def _options(url: SplitResult) -> dict[str, str]:
    options = dict(parse_qsl(url.query, keep_blank_values=True))
    allowed = {"prefix", *TLS_OPTIONS} if url.scheme == "rediss" else {"prefix"}
    if set(options) - allowed:
        # not repeated: what stands there may be half a password
        raise ValueError(f"behind the ? of {url.scheme}:// may stand {', '.join(sorted(allowed))}, and nothing else")
    for name in TLS_OPTIONS:
        if name in options and not Path(options[name]).is_file():
            raise ValueError(f"{name} names no file: {options[name]!r}")
    return options
