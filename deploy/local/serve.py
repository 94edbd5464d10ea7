"""Keeps the service up in the foreground."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.local.credentials import Credentials
from deploy.local.stack import Stack, StackConfig
from models.shapes_vlm.paths import SAMPLES


@dataclass(frozen=True, kw_only=True)
class ServeConfig(StackConfig):
    """Start router and workers and keep them up; ctrl-C drains them."""

    port: int = 50051
    """gRPC port of the router; 0 picks a free one."""
    json: bool = False
    """Say where everything is as one line of JSON."""


async def run_serve(stack: Stack, config: ServeConfig) -> int:
    """Says where everything is, then waits until it is cancelled."""
    print(_document(stack) if config.json else _text(stack), flush=True)
    await asyncio.Event().wait()
    return 0


def _document(stack: Stack) -> str:
    services = [dataclasses.asdict(service) for service in stack.services]
    document: dict[str, Any] = {"address": stack.address, "log_dir": str(stack.log_dir), "services": services}
    if stack.base_url:
        document["base_url"] = stack.base_url
    if stack.page_url:
        document["page_url"] = stack.page_url
    if stack.credentials is not None:
        document |= {"token": stack.credentials.token, "ca_file": str(stack.credentials.ca)}
    return json.dumps(document)


def _text(stack: Stack) -> str:
    lines = [f"vlcache listens at {stack.address}, logs in {stack.log_dir}"]
    width = max(len(service.name) for service in stack.services)
    for service in stack.services:
        where = f"{service.address:<21} http://{service.metrics_address}/metrics"
        lines.append(f"  {service.role:<8} {service.name:<{width}} {where}")
    if stack.base_url:
        lines.append(f"OpenAI's chat API is at {stack.base_url}")
    if stack.page_url:
        lines.append(f"its page is at {stack.page_url}")
    lines += ["try", f"  {example(stack.address, stack.credentials)}", "ctrl-C drains and stops"]
    return "\n".join(lines)


def example(address: str, credentials: Credentials | None = None) -> str:
    """A command that asks about a bundled image, as it works from this folder."""
    beside_python = os.path.relpath(Path(sys.executable).parent / "vlcache")
    image = os.path.relpath(SAMPLES / "scene_1.png")
    command = "vlcache" if shutil.which("vlcache") else beside_python
    words = [command, "ask", "What does the yellow plate say?", "--image", image, "--address", address]
    if credentials is None:
        return shlex.join(words)
    return f"VLCACHE_TOKEN={credentials.token} " + shlex.join([*words, "--ca-file", str(credentials.ca)])
