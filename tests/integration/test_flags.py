"""Flags that reach workers through a launcher, and through files."""

from __future__ import annotations

from pathlib import Path

import pytest
import vlcache

from deploy.local.forks import Forks
from deploy.local.stack import StackConfig
from tests.integration.conftest import EXACT
from tests.integration.running_stack import RunningStack

CONTEXT = 60
QUESTION = "Say something, anything, 1 2 3."
FILES = {
    "prefill": "default-max-new-tokens: 3\nmax_images: 2\n",
    "decode": "kv-memory-mib: 1\n",
    "router": "tenant-concurrency: 1\n",
}


def a_shorter_context_holds_for_the_whole_service(client: vlcache.Client) -> None:
    (model,) = client.models()
    assert (model.name, model.context_tokens) == ("short", CONTEXT)
    prompt = client.generate(QUESTION, sampling=vlcache.Sampling(max_new_tokens=1)).usage.prompt_tokens
    room = CONTEXT - prompt
    whole = client.generate(QUESTION, sampling=vlcache.Sampling(max_new_tokens=room, ignore_eos=True))
    assert len(whole.token_ids) == room > 8
    with pytest.raises(vlcache.VlcacheError, match=f"the context is {CONTEXT}"):
        client.generate(QUESTION, sampling=vlcache.Sampling(max_new_tokens=room + 1))


def test_launcher_and_files_tell_workers_what_they_were_told(forks: Forks, tmp_path: Path) -> None:
    for role, text in FILES.items():
        (tmp_path / role).write_text(text)
    given = {f"{role}_flags": (f"--config={tmp_path / role}",) for role in FILES}
    config = StackConfig(dtype=EXACT, served_model_name="short", max_model_len=CONTEXT, kv_memory_mib=7, **given)
    with RunningStack(config, forks) as stack:
        with stack.client() as client:
            answer = client.generate(QUESTION, sampling=vlcache.Sampling(ignore_eos=True))
            assert (len(answer.token_ids), client.models()[0].max_images) == (3, 2)
            a_shorter_context_holds_for_the_whole_service(client)
        (decode,) = stack.worker_infos("decode")
        # what the launcher says itself wins over the file
        assert decode.kv.capacity == 7 << 20
    assert stack.clean
