"""Videos from strangers: what is looked at is decided from headers, everything odd is refused with a sentence."""

from __future__ import annotations

import contextlib
import itertools
import random
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from vlcache.v1 import inference_pb2 as pb

from prefill_worker.preprocess import clips, video_file
from prefill_worker.preprocess.clips import Clip, open_clip, sampled
from prefill_worker.preprocess.families import VideoRule
from prefill_worker.preprocess.video_patches import PixelBounds, frames_size
from shared.errors import InvalidRequestError
from tests.families.chats import png
from tests.families.videos import brightness, greys, recorded

MP4 = recorded(greys(30))


def opened(data: bytes, **fields: Any) -> tuple[Clip, list[Image.Image]]:
    clip = open_clip(pb.Video(file=data, **fields), 0, max_frames=64)
    return clip, list(clip.frames)


def refused(video: pb.Video, match: str) -> None:
    with pytest.raises(InvalidRequestError, match=match) as error:
        list(open_clip(video, 1, max_frames=64).frames)
    assert error.value.reason == "BAD_VIDEO"
    assert error.value.message.startswith("video 2 ")


@given(
    total=st.integers(1, 5000),
    rate=st.floats(0.01, 1000),
    fps=st.floats(0.001, 100),
    most=st.integers(1, 256),
)
def test_frames_are_sampled_evenly_within_bounds(total: int, rate: float, fps: float, most: int) -> None:
    indices = sampled(total, rate, fps=fps, most=most, to_the_end=False)
    assert indices[0] == 0
    assert indices[-1] < total
    assert len(indices) == len(set(indices)) <= max(most, 1)
    assert len(indices) % 2 == 0 or len(indices) == 1
    gaps = {after - before for before, after in itertools.pairwise(indices)}
    assert max(gaps, default=0) - min(gaps, default=0) <= 1


def test_sampling_is_that_of_transformers_for_qwen2() -> None:
    # three seconds at 10 frames a second; a minute at 30; half a second
    assert sampled(30, 10, fps=2, most=64, to_the_end=False) == [0, 5, 10, 15, 20, 25]
    assert len(sampled(1800, 30, fps=2, most=768, to_the_end=False)) == 120
    assert sampled(15, 30, fps=2, most=64, to_the_end=False) == [0, 3, 7, 11]


@given(total=st.integers(1, 20_000), rate=st.floats(1, 60), fps=st.floats(0.1, 30), most=st.integers(4, 768))
def test_sampling_is_that_of_transformers_for_qwen3(total: int, rate: float, fps: float, most: int) -> None:
    # as `Qwen3VLVideoProcessor.sample_frames` of transformers 5.23 has it, which needs torchvision
    count = min(max(int(total / rate * fps), 4), most, total)
    expected = np.linspace(0, total - 1, count).round().astype(int).tolist()
    indices = sampled(total, rate, fps=fps, most=most, to_the_end=True)
    assert indices == expected
    assert (indices[0], indices[-1]) == (0, total - 1)


@given(
    least=st.integers(1, 10**6),
    more=st.integers(0, 10**8),
    frames=st.integers(1, 32).map(lambda pairs: 2 * pairs),
    width=st.integers(8, 4000),
    height=st.integers(8, 4000),
    together=st.booleans(),
    spare=st.integers(0, 10_000),
)
def test_a_video_never_has_more_tokens_than_it_may(
    least: int, more: int, frames: int, width: int, height: int, together: bool, spare: int
) -> None:
    side, most = 28, 8 * frames + spare
    if max(width, height) > video_file.MAX_ASPECT * min(width, height):
        return
    bounds = PixelBounds(least, least + more)
    size = frames_size(bounds, VideoRule(pixels_together=together), frames, token_pixels=side**2, max_tokens=most)
    made = smart_resize(height, width, factor=side, min_pixels=size["shortest_edge"], max_pixels=size["longest_edge"])
    assert 0 < made[0] // side * (made[1] // side) * frames // 2 <= most


@pytest.mark.parametrize(
    ("container", "codec"), [("mp4", "mpeg4"), ("mov", "mpeg4"), ("webm", "libvpx-vp9"), ("matroska", "libvpx")]
)
def test_files_show_the_frames_of_their_times(container: str, codec: str) -> None:
    clip, frames = opened(recorded(greys(30), container, codec))
    assert clip.seconds == pytest.approx([0, 0.5, 1, 1.5, 2, 2.5])
    assert clip.fps == pytest.approx(2)
    assert [brightness(frame) for frame in frames] == [0, 5, 10, 15, 20, 25]
    assert all(frame.size == (64, 48) and frame.mode == "RGB" for frame in frames)


def test_a_long_file_is_not_decoded_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """From one wanted frame to the next it jumps to the key frame before."""
    looked_at = []
    check = video_file.check_size
    monkeypatch.setattr(video_file, "check_size", lambda *size: looked_at.append(check(*size)))
    shown = [Image.new("RGB", (64, 48), (16 + 6 * (at // 10 % 32),) * 3) for at in range(320)]
    clip, frames = opened(recorded(shown), sample_fps=0.125)
    assert [brightness(frame) for frame in frames] == [0, 8, 16, 24]
    assert len(looked_at) < 160
    assert clip.seconds == (0, 8, 16, 24)


def test_a_film_of_a_turned_camera_is_upright() -> None:
    """As telephones write it: a matrix that turns the picture clockwise by a quarter."""
    shown = Image.new("RGB", (64, 48))
    shown.paste((255, 255, 255), (0, 0, 32, 48))
    film = recorded([shown] * 4)
    track = film.index(b"tkhd")
    plain, turned = ((1, 0, 0, 0, 1, 0, 0, 0), (0, 1, 0, -1, 0, 0, 0, 0))
    matrix, wanted = (struct.pack(">9i", *(one << 16 for one in values), 1 << 30) for values in (plain, turned))
    place = film.index(matrix, track)
    _, (first, *_) = opened(film[:place] + wanted + film[place + len(wanted) :])
    assert first.size == (48, 64)
    top, bottom = (first.getpixel((24, row)) for row in (8, 56))
    assert min(top) > 200  # type: ignore[arg-type]
    assert max(bottom) < 50  # type: ignore[arg-type]


def test_frames_are_sampled_only_where_they_say_how_fast_they_are() -> None:
    images = [pb.Image(data=png(frame)) for frame in greys(20)]
    for fps, indices in ((10.0, [0, 5, 10, 15]), (None, list(range(20)))):
        clip = open_clip(pb.Video(frames=pb.Frames(images=images, fps=fps)), 0, max_frames=64)
        assert [brightness(frame) for frame in clip.frames] == indices
        assert clip.seconds == tuple(index / (fps or 2.0) for index in indices)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "is empty|is no MP4"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "is no MP4, MOV, WebM or Matroska"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "is no MP4"),
        (png(greys(1)[0]), "is no MP4"),
        (MP4[: len(MP4) // 3], "is truncated or corrupt"),
        (b"\0\0\0\x18ftypisom" + bytes(100), "is truncated or corrupt|no pictures"),
        (b"\x1a\x45\xdf\xa3" + bytes(100), "is truncated or corrupt|no pictures"),
        (recorded(greys(2), "matroska", "ffv1"), "is coded otherwise than in"),
        (recorded(greys(4, (640, 16)), "mp4"), "may be at most 16 times"),
    ],
)
def test_what_is_no_good_file_is_refused(data: bytes, match: str) -> None:
    refused(pb.Video(file=data), match)


def test_limits_hold_before_a_frame_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(video_file.VideoFile, "frames", never)
    for module, name, value, match in (
        (video_file, "MAX_BYTES", len(MP4) - 1, "bytes; at most"),
        (video_file, "MAX_PIXELS", 64 * 48 - 1, "has 64 x 48 pixels"),
        (video_file, "MAX_RATE", 9.0, "does not say how long"),
        (clips, "MAX_DURATION_S", 2.9, "has 3 s; at most 3"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            refused(pb.Video(file=MP4), match)


def test_a_header_that_claims_more_than_there_is() -> None:
    film = recorded(greys(12), "webm", "libvpx")
    # the element of the duration, a double of so many milliseconds
    place = film.index(b"\x44\x89\x88") + 3
    assert struct.unpack_from(">d", film, place) == (1200,)
    for claimed, match in (
        (120_000, "ends before"),
        (-1, "does not say"),
        (float("nan"), "does not say"),
        (1e9, "at most"),
    ):
        refused(pb.Video(file=film[:place] + struct.pack(">d", claimed) + film[place + 8 :]), match)


@pytest.mark.parametrize(
    ("video", "match"),
    [
        (pb.Video(), "is empty"),
        (pb.Video(frames=pb.Frames()), "is empty"),
        (pb.Video(frames=pb.Frames(images=[pb.Image(data=b"x")])), "has a bad frame: image 1 is no readable"),
        (pb.Video(frames=pb.Frames(images=[pb.Image(data=png(greys(1, (320, 16))[0]))])), "16 times the other"),
        (pb.Video(file=MP4, sample_fps=0), "sample_fps = 0; it must be positive"),
        (pb.Video(file=MP4, sample_fps=float("nan")), "sample_fps = nan"),
        (pb.Video(file=MP4, max_frames=0), "max_frames = 0"),
    ],
)
def test_bad_frames_and_wishes_are_refused(video: pb.Video, match: str) -> None:
    refused(video, match)


@pytest.mark.parametrize("fps", [0.0, 1e9, float("nan"), -1.0])
def test_frames_have_a_possible_rate(fps: float) -> None:
    images = [pb.Image(data=png(frame)) for frame in greys(4)]
    refused(pb.Video(frames=pb.Frames(images=images, fps=fps)), "frames per second")


def test_frames_of_different_sizes_are_refused() -> None:
    images = [pb.Image(data=png(frame)) for frame in (*greys(3), *greys(1, (48, 64)))]
    refused(pb.Video(frames=pb.Frames(images=images)), "frames of different sizes")


@pytest.mark.parametrize("container", ["mp4", "webm"])
def test_damaged_files_are_refused_or_read(container: str) -> None:
    codec = "mpeg4" if container == "mp4" else "libvpx"
    good, draw = recorded(greys(12), container, codec), random.Random(0)
    for _ in range(60):
        damaged = bytearray(good)
        for _ in range(draw.choice((1, 8, 64))):
            damaged[draw.randrange(12, len(damaged))] = draw.randrange(256)
        with contextlib.suppress(InvalidRequestError):
            _, frames = opened(bytes(damaged))
            assert len({frame.size for frame in frames}) == 1


def test_without_pyav_a_file_is_refused_and_frames_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(video_file.importlib, "import_module", missing)
    refused(pb.Video(file=MP4), "send its frames")
    images = [pb.Image(data=png(frame)) for frame in greys(4)]
    assert len(list(open_clip(pb.Video(frames=pb.Frames(images=images)), 0, max_frames=64).frames)) == 4
