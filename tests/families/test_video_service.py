"""Videos through the whole service over real gRPC, and thousands of their tokens through both halves."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import vlcache
from transformers import PretrainedConfig
from vlcache.v1 import inference_pb2 as pb

from tests.families.chats import SMALL, png
from tests.families.family import Family
from tests.families.loaded import Loaded, load
from tests.families.prefilling import Prefilling, close
from tests.families.test_service import LONG, TOKENS, stack
from tests.families.test_video import reading
from tests.families.videos import QUESTION, frames, known_wrong, own_inputs, recorded, sent, user

FRAMES = frames(8)


@reading
def test_the_service_answers_as_generate_does(loaded: Loaded, prefilling: Prefilling) -> None:
    film, encoded = recorded(FRAMES), [png(frame) for frame in FRAMES]
    # what is shown, seconds of a temporal patch, and how a client says it. Of the film's 0.8 s four frames
    asked: list[tuple[list[Any], float, dict[str, Any]]] = [
        ([sent(FRAMES)], 1.0, {"videos": [encoded]}),
        ([pb.Part(video=pb.Video(file=film))], 0.4, {"videos": [film]}),
        ([SMALL, sent(FRAMES)], 1.0, {"images": [png(SMALL)], "videos": [encoded]}),
    ]
    sampling = vlcache.Sampling(max_new_tokens=TOKENS, ignore_eos=True)

    async def ask(client: vlcache.AsyncClient, question: str, retention: float = 1.0, **shown: Any) -> Any:
        compression = vlcache.Compression(retention=retention)
        return await client.generate(question, sampling=sampling, compression=compression, **shown)

    async def body(sockets: Path) -> None:
        async with stack(loaded.folder, sockets) as client:
            # together: they decode in one batch
            answers = await asyncio.gather(*(ask(client, QUESTION, **shown) for _, _, shown in asked))
            for answer, (parts, seconds, _) in zip(answers, asked, strict=True):
                prompt = prefilling.builder.build(user(*parts, QUESTION), max_new_tokens=TOKENS)
                assert answer.usage.visual_tokens == prompt.shape.num_visual
                if known_wrong(loaded, seconds):
                    continue
                assert list(answer.token_ids) == loaded.answer(own_inputs(loaded, prompt, seconds), TOKENS)
            cut = await ask(client, LONG, 0.1, videos=[encoded])
            assert cut.compression.realised_retention <= 0.1
            with pytest.raises(vlcache.InvalidRequest, match="video 1 is no MP4") as refused:
                await ask(client, QUESTION, videos=[b"#EXTM3U"])
            assert refused.value.reason == "BAD_VIDEO"

    # pytest's own folders may be too deep for a socket
    with tempfile.TemporaryDirectory() as sockets:
        asyncio.run(asyncio.wait_for(body(Path(sockets)), 100))


def longer(family: Family) -> Family:
    def build_config(tokenizer: Any) -> PretrainedConfig:
        config = family.build_config(tokenizer)
        config.text_config.max_position_embeddings = 4096
        return config

    return dataclasses.replace(family, build_config=build_config)


@pytest.mark.parametrize("family", ["qwen2_5_vl"], indirect=True)
def test_thousands_of_visual_tokens(family: Family, tmp_path: Path) -> None:
    """Also: how large frames may be is read from the checkpoint."""
    longer(family).save(tmp_path)
    size = {"shortest_edge": 28 * 28, "longest_edge": 64 * 28 * 28}
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps({"size": size}))
    loaded = load(tmp_path)
    prefilling = Prefilling(loaded)
    prompt = prefilling.builder.build(user(sent(frames(64, (224, 224))), QUESTION), max_new_tokens=1)
    # 32 pairs of frames
    assert prompt.shape.num_visual == 32 * 64
    found = prefilling.engine.prefill(prompt, (), threading.Event())
    with torch.inference_mode():
        expected = loaded.model(**own_inputs(loaded, prompt, 1.0)).logits[0, -1]
    assert close(found.logits, expected)
