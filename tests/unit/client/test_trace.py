"""A request is part of the trace that its caller is in; without OpenTelemetry nothing is sent, nor loaded."""

import asyncio
import subprocess
import sys

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import format_span_id, format_trace_id
from vlcache import AsyncClient, Client
from vlcache._trace import trace_metadata

from tests.unit.client.service import whole_answer

PROBE = "import sys, vlcache, vlcache._trace as t; print(t.trace_metadata(), 'opentelemetry' in sys.modules)"


def sent(service):
    """The trace contexts that calls came with."""
    return [dict(metadata).get("traceparent") for metadata in service.metadata]


def test_the_active_span_is_the_parent(service):
    service.attempts = [whole_answer(), whole_answer(), whole_answer()]
    with Client(service.address, tenant="team-a") as client:
        with TracerProvider(shutdown_on_exit=False).get_tracer("mine").start_as_current_span("mine") as span:
            stream = client.stream("Which?")
            asyncio.run(ask(service.address))
        # read after the span: its place was taken before
        stream.result()
        client.generate("Which?")
    context = span.get_span_context()
    ids = f"{format_trace_id(context.trace_id)}-{format_span_id(context.span_id)}"
    mine = f"00-{ids}-{context.trace_flags:02x}"
    assert sent(service) == [mine, mine, None]
    assert service.tenants == [None, "team-a", "team-a"]


async def ask(address):
    async with AsyncClient(address) as client:
        await client.generate("Which?")


def test_outside_of_a_span_there_is_none():
    assert trace_metadata() == ()


def test_opentelemetry_is_never_loaded():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["()", "False"]
