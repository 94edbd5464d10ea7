"""One question, one call."""

import asyncio

import pytest
import vlcache
from vlcache import Compression, Sampling, Timeout

from tests.unit.client.service import whole_answer


def ask(kind, *arguments, **options):
    return (
        vlcache.ask(*arguments, **options) if kind == "ask" else asyncio.run(vlcache.ask_async(*arguments, **options))
    )


@pytest.mark.parametrize("kind", ["ask", "ask_async"])
def test_it_sends_everything_and_closes(service, kind, tmp_path):
    (tmp_path / "a.png").write_bytes(b"png")
    service.attempts = [whole_answer()]
    answer = ask(
        kind,
        "Which?",
        tmp_path / "a.png",
        b"bytes",
        address=service.address,
        model="m",
        sampling=Sampling(seed=3),
        compression=Compression(retention=0.2),
        timeout=Timeout(total_s=9),
        token="secret",
    )
    assert f"{answer}" == "a red dot"
    (request,) = service.requests
    parts = request.messages[0].parts
    assert [part.image.data for part in parts[:2]] == [b"png", b"bytes"]
    assert (parts[2].text, request.model, request.sampling.seed) == ("Which?", "m", 3)
    assert request.compression.retention == 0.2
    assert service.remaining_s[0] < 9.2
    assert dict(service.metadata[0])["authorization"] == "Bearer secret"


@pytest.mark.parametrize("kind", ["ask", "ask_async"])
def test_a_token_does_not_leave_in_plaintext(kind):
    with pytest.raises(ValueError, match="plaintext"):
        ask(kind, "?", address="example.com:1", token="secret")
