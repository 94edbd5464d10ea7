"""Videos as a client sends them, and what transformers' models take of a prompt that shows some."""

from __future__ import annotations

import io
from typing import Any

import av
import numpy as np
import torch
import transformers
from PIL import Image
from vlcache.v1 import inference_pb2 as pb

from prefill_worker.prompt import Prompt
from tests.families.chats import png
from tests.families.loaded import Loaded, noise

QUESTION = "What happens in the video?"
VIDEO_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
OLDEST = transformers.__version__.startswith("5.17.")


def frames(count: int, size: tuple[int, int] = (84, 56), seed: int = 0) -> list[Image.Image]:
    """None resembles another."""
    return [noise(*size, seed=seed + at) for at in range(count)]


def sent(shown: list[Image.Image], **fields: Any) -> pb.Part:
    fps = fields.pop("fps", None)
    sources = pb.Frames(images=[pb.Image(data=png(frame)) for frame in shown], fps=fps)
    return pb.Part(video=pb.Video(frames=sources, **fields))


def recorded(shown: list[Image.Image], container: str = "mp4", codec: str = "mpeg4", rate: int = 10) -> bytes:
    """A file of all frames."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate)
        stream.bit_rate = 4_000_000
        stream.width, stream.height, stream.pix_fmt = *shown[0].size, "yuv420p"
        for frame in shown:
            file.mux(stream.encode(av.VideoFrame.from_image(frame)))
        file.mux(stream.encode(None))
    return buffer.getvalue()


def greys(count: int, size: tuple[int, int] = (64, 48)) -> list[Image.Image]:
    """Each a little brighter than the one before, which survives lossy codecs."""
    return [Image.new("RGB", size, (16 + 6 * at,) * 3) for at in range(count)]


def brightness(frame: Image.Image) -> int:
    """Which of `greys` it is."""
    return round((float(np.asarray(frame).mean()) - 16) / 6)


def user(*parts: pb.Part | Image.Image | str) -> list[pb.Message]:
    return [pb.Message(role="user", parts=[_part(part) for part in parts])]


def _part(part: pb.Part | Image.Image | str) -> pb.Part:
    if isinstance(part, pb.Part):
        return part
    return pb.Part(text=part) if isinstance(part, str) else pb.Part(image=pb.Image(data=png(part)))


def known_wrong(loaded: Loaded, seconds_per_patch: float) -> bool:
    """Whether transformers' own positions are: 5.17 leaves out what is no whole second."""
    return OLDEST and loaded.model.config.model_type == "qwen2_5_vl" and seconds_per_patch % 1 != 0


def own_inputs(loaded: Loaded, prompt: Prompt, seconds_per_patch: float | None = None) -> dict[str, Any]:
    """The pixels of a prompt under the names that transformers has for those of images and of videos."""
    ids, config = prompt.inputs["input_ids"], loaded.model.config
    types = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": types,
    }
    # images of one temporal patch, in these tests, are no videos
    video = [int(grid[0]) > 1 for grid in prompt.inputs["image_grid_thw"]]
    for suffix, wanted in (("", False), ("_videos", True)):
        shown = [image for image, is_video in zip(prompt.images, video, strict=True) if is_video == wanted]
        if shown:
            inputs[f"pixel_values{suffix}"] = torch.cat([each["pixel_values"] for each in shown])
            grid = "video_grid_thw" if wanted else "image_grid_thw"
            inputs[grid] = torch.cat([each["image_grid_thw"] for each in shown])
    if loaded.model.config.model_type == "qwen2_5_vl":
        inputs["second_per_grid_ts"] = torch.tensor([seconds_per_patch] * sum(video))
    return inputs
