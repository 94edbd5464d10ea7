"""A load generator of the field, GuideLLM, against the chat API: it streams, with images, and counts no error.

It brings a torch of its own, so it is installed in an environment of its own and found by PATH.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from deploy.local.forks import Forks
from models.shapes_vlm.paths import CHECKPOINT
from tests.integration.conftest import stack_config
from tests.integration.running_stack import RunningStack

TOOL = shutil.which("guidellm")
REQUESTS = 12
FINISHED = 'vlcache_requests_total{code="OK",model="",outcome="finished",role="router",worker="router"}'


@pytest.mark.heavy
@pytest.mark.skipif(TOOL is None, reason="there is no guidellm")
def test_guidellm(forks: Forks, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    with RunningStack(stack_config("auto", http_port=0), forks) as stack:
        target = stack.base_url.removesuffix("/v1")
        options = {
            "--backend": f"kind=openai_http,target={target},model=shapes-vlm,extras.body.retention=0.2",
            "--profile": "kind=concurrent,streams=4",
            "--constraint": f"kind=max_requests,count={REQUESTS}",
            "--tokenizer": f"kind=huggingface_auto,model={CHECKPOINT}",
            "--output": f"kind=json,path={report}",
        }
        data = ["kind=synthetic_image,width=336,height=336", "kind=synthetic_text,prompt_tokens=20,output_tokens=16"]
        command = [str(TOOL), "run", "--disable-console", *(word for option in options.items() for word in option)]
        command += [word for each in data for word in ("--data", each)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        # it must not find this environment's packages in place of its own
        environment.pop("PYTHONPATH", None)
        done = subprocess.run(command, capture_output=True, text=True, timeout=110, env=environment)
        stack.wait_idle()
        requests = [line for line in stack.metrics("router").splitlines() if line.startswith("vlcache_requests_total")]
    assert done.returncode == 0, done.stdout + done.stderr
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    ended = {outcome: len(requests) for outcome, requests in benchmark["requests"].items() if requests}
    # its report may leave out the last one
    assert ended.keys() == {"successful"}
    assert {line for line in requests if not line.endswith(" 0.0")} == {f"{FINISHED} {REQUESTS}.0"}
    assert benchmark["metrics"]["time_to_first_token_ms"]["successful"]["median"] > 0
    assert stack.clean
