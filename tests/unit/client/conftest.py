from collections.abc import Iterator

import pytest
from vlcache import Client, RetryPolicy, Timeout

from tests.unit.client.service import ScriptedService, serve

FAST_RETRIES = RetryPolicy(max_attempts=3, initial_backoff_s=0.02, max_backoff_s=0.05, jitter=0.0)


@pytest.fixture
def service() -> Iterator[ScriptedService]:
    scripted = ScriptedService()
    server = serve(scripted)
    yield scripted
    server.stop(grace=None).wait()


@pytest.fixture
def client(service: ScriptedService) -> Iterator[Client]:
    with Client(service.address, timeout=Timeout(total_s=20), retry=FAST_RETRIES) as made:
        yield made
