"""A whole prefill worker that is asked anything: it refuses with a sentence, holds nothing, and goes on."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from vlcache.worker.v1 import prefill_pb2 as pb

from prefill_worker.compression.registry import CHOICES
from prefill_worker.config import PrefillConfig
from prefill_worker.worker import LoadedModel, load_model
from tests.fuzz import seeds
from tests.fuzz.mutation import mutated, strange
from tests.fuzz.refusals import taken
from tests.fuzz.running import fuzz_served
from tests.unit.decode_worker.tiny import save_checkpoint
from tests.unit.prefill_worker.prompts import QUESTION, encoded, picture
from tests.unit.prefill_worker.served import Stack, run

# After so many cases somebody asks whom nothing of this concerns.
INNOCENT = 25
ADDRESSES = ("", "127.0.0.1:1", "nobody", "127.0.0.1:99999", "unix:/tmp/x", "dns:///a", "1.2.3.4:x", "[::1]:1", "\x00")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    torch.set_num_threads(1)
    checkpoint: Path = save_checkpoint(tmp_path_factory.mktemp("tiny"))
    return load_model(PrefillConfig(model=str(checkpoint), dtype="float32"))


def prompt(chance: random.Random, stack: Stack) -> pb.PrefillRequest:
    """A right one, after accidents in some of its parts."""
    images = [encoded(picture(1)), *seeds.images()]
    parts: list[Any] = [chance.choice(images), QUESTION]
    if chance.random() < 0.3:
        parts[0] = mutated(chance, parts[0], images)
    request = stack.request(*chance.choice((parts, parts[1:], [*parts, *parts])))
    request.request.compression.policy = chance.choice([*CHOICES, "", "none"])
    for message in (request.request.sampling, request.request.compression, request.request, request):
        if chance.random() < 0.3:
            strange(chance, message)
    # or nothing would get beyond it
    request.epoch = stack.info.epoch if chance.random() < 0.95 else "old"
    request.ticket.CopyFrom(stack.ticket(stack.sink))
    if chance.random() < 0.2:
        strange(chance, request.ticket)
        request.ticket.decode_address = chance.choice(ADDRESSES)
    return request


@pytest.mark.fuzz
def test_prompts(loaded: LoadedModel) -> None:
    seen = Counter[str]()

    async def body(stack: Stack) -> None:
        asked = 0

        async def case(chance: random.Random) -> None:
            nonlocal asked
            request = prompt(chance, stack)
            # somebody who cannot be reached is no fault of the prompt's
            events = await taken(stack.prefill(request), seen, "UNAVAILABLE") or []
            seen.update(event.WhichOneof("event") for event in events)
            resend = pb.ResendRequest(parcel=request.parcel, attempt=2, ticket=request.ticket)
            if chance.random() < 0.3:
                strange(chance, resend)
            await taken(stack.stub.Resend(resend), seen, "UNAVAILABLE")
            await taken(
                stack.stub.RenewParcels(strange(chance, pb.RenewParcelsRequest(parcels=[request.parcel]))), seen
            )
            await taken(stack.stub.ReleaseParcels(pb.ReleaseParcelsRequest(parcels=[request.parcel])), seen)
            stack.sink.parcels.clear()
            stack.nothing_is_held()
            asked += 1
            if asked % INNOCENT == 0:
                await innocent(stack)

        await fuzz_served(case)

    run(loaded, body, timeout_s=None)
    # or the cases would say little
    assert {"OK", "transfer", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION"} <= seen.keys(), seen


async def innocent(stack: Stack) -> None:
    request = stack.request(encoded(picture(1)), QUESTION)
    events = await stack.prefill(request)
    assert [event.WhichOneof("event") for event in events] == ["first_token", "compression", "retained", "transfer"]
    await stack.release(request.parcel)
    stack.nothing_is_held()
