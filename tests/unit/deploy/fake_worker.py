"""A worker process without a model: the fakes of the router's tests, with the flags of the real workers.

Its role is the first word of `--name`; a combined one has both. FAKE_WORKER tells it to misbehave.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys

from shared.rpc.lifecycle import stop_signal
from shared.telemetry.announce import announce
from tests.unit.router.fakes import FakeDecode, FakePrefill, Log

EXIT_CODE = 3


class LastPoll(Log):
    """Ends the process at the third look of the router: it was ready, and then it was gone."""

    def append(self, item: object) -> None:
        super().append(item)
        if len(self) == 3:
            print("out of memory", file=sys.stderr, flush=True)
            os._exit(EXIT_CODE)


async def serve(name: str) -> None:
    role = name.partition("-")[0]
    fault = os.environ.get("FAKE_WORKER", "")
    if fault == f"{role} crashes":
        print("no such checkpoint", file=sys.stderr)
        sys.exit(EXIT_CODE)
    if fault == f"{role} is mute":
        await asyncio.Event().wait()
    if role == "combined":
        workers = [FakePrefill(f"{name}-prefill"), FakeDecode(f"{name}-decode")]
    else:
        workers = [{"prefill": FakePrefill, "decode": FakeDecode}[role](name)]
    if fault == f"{role} dies later":
        workers[0].polls = LastPoll()
    if fault == f"{role} does not stop":
        stopped = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_signal_handler(15, lambda: print("no", file=sys.stderr))
    else:
        stopped = asyncio.create_task(stop_signal())
    for worker in workers:
        await worker.start()
        print("a line that is no announcement")
        announce(name=worker.info.name, role=worker.role, address=worker.address, metrics_address="127.0.0.1:1")
    await stopped
    for worker in workers:
        await worker.stop()
    if fault == f"{role} stops badly":
        sys.exit(EXIT_CODE)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", required=True)
    asyncio.run(serve(parser.parse_known_args()[0].name))
