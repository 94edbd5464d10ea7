"""From a chat request to arrays: checks, chat template, image and text processing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import Image
from vlcache.v1 import inference_pb2 as pb

from prefill_worker.preprocess.clips import Clip, open_clip
from prefill_worker.preprocess.conversation import render
from prefill_worker.preprocess.families import family_of, video_families
from prefill_worker.preprocess.image_counts import ImageBound, image_bounds, image_views
from prefill_worker.preprocess.image_grid import ImageGrid, image_grids
from prefill_worker.preprocess.images import open_images
from prefill_worker.preprocess.positions import Block, Positions, block_positions, plain_positions
from prefill_worker.preprocess.processed import Array, ProcessedPrompt
from prefill_worker.preprocess.token_kinds import TokenKinds
from prefill_worker.preprocess.video_limits import MAX_VIDEO_FRAMES, MAX_VIDEO_TOKENS
from prefill_worker.preprocess.video_prompt import VideoPrompts
from shared.errors import ContextTooLongError, InvalidRequestError

ROLES = ("system", "user", "assistant")
# No tokenizer makes fewer tokens than this of running text: refuses absurd texts before tokenising them.
MAX_BYTES_PER_TOKEN = 64
# What processors make of text for models that do not get it from us: one unpadded prompt has a mask of ones, and which
# tokens are visual is known.
UNUSED_INPUTS = ("attention_mask", "token_type_ids", "mm_token_type_ids")
# What one image adds to a prompt is seen on one of so many pixels per side.
SAMPLE_SIDE = 64
IMAGE, VIDEO = pb.Part(image=pb.Image()), pb.Part(video=pb.Video())


@dataclass(frozen=True, kw_only=True)
class PromptLimits:
    """What preprocessing must know of the model beside its processor."""

    model_type: str
    image_token_id: int
    context_tokens: int
    max_images: int
    video_token_id: int | None = None
    tokens_per_second: float | None = None
    max_video_frames: int = MAX_VIDEO_FRAMES
    max_video_tokens: int = MAX_VIDEO_TOKENS

    @property
    def visual_token_ids(self) -> tuple[int, ...]:
        """What stands for a feature of an image or a video."""
        return (self.image_token_id,) if self.video_token_id is None else (self.image_token_id, self.video_token_id)


class PromptProcessor:
    """Turns messages into a `ProcessedPrompt`. Thread-safe.

    Args:
        processor: Tokenizer and image processor, see `load_processor`.
    """

    def __init__(self, processor: Any, limits: PromptLimits) -> None:
        self._processor = processor
        self._limits = limits
        self._family = family_of(limits.model_type)
        self._kinds = TokenKinds(processor.tokenizer, limits.visual_token_ids)
        self._reserved = tuple(processor.tokenizer.added_tokens_encoder)
        self._videos: VideoPrompts | None = None
        if self._family.video and limits.video_token_id is not None:
            self._videos = VideoPrompts(
                processor,
                self._family.video,
                tokens_per_second=limits.tokens_per_second,
                max_tokens=limits.max_video_tokens,
            )

    def process(self, messages: Sequence[pb.Message], *, max_new_tokens: int) -> ProcessedPrompt:
        """Checks and tokenises a conversation.

        Raises:
            InvalidRequestError: Bad roles, texts, images or videos.
            ContextTooLongError: Prompt and answer do not fit the context.
        """
        self._check_messages(messages)
        encoded = [part.image.data for message in messages for part in message.parts if part.HasField("image")]
        images = open_images(encoded)
        shown = self._shown(messages, images)
        inputs, blocks = self._inputs(render(self._processor, messages), shown)
        tokens = inputs["input_ids"][0].tolist()
        self._check_context(len(tokens), max_new_tokens)
        return ProcessedPrompt(
            inputs=inputs,
            special=self._kinds.special(tokens),
            punctuation=self._kinds.punctuation(tokens),
            seed=_hash(inputs),
            pixels=tuple(image.width * image.height for image in images),
            positions=self._positions(inputs, blocks),
            views=self._views(inputs, shown),
            grids=self._grids(inputs, shown),
        )

    @property
    def reads_videos(self) -> bool:
        """Whether the model does."""
        return self._videos is not None

    def template_tokens(self) -> int:
        """Upper bound of what the chat template adds to a message: its bytes, whatever they merge with."""
        return len(render(self._processor, [_empty_message(0)]).encode())

    def image_bounds(self) -> list[ImageBound]:
        """Upper bounds of the visual tokens of one image, ascending; the last one is for all."""
        return image_bounds(self._processor)

    def marker_tokens(self) -> int:
        """Upper bound of the text tokens that template and processor put around one image, and between its tiles."""
        sample = Image.new("RGB", (SAMPLE_SIDE, SAMPLE_SIDE))
        with_image, without = (
            self._text_bound(self._process(render(self._processor, [_empty_message(len(images))]), images))
            for images in ([sample], [])
        )
        # the marker of the last image is the longest one: it may carry the image's number
        longer = self._marker_bytes(self._limits.max_images, IMAGE) - self._marker_bytes(1, IMAGE)
        return with_image - without + max(0, longer)

    def video_marker_tokens(self) -> int:
        """As `marker_tokens`, for one video; 0 where the model reads none."""
        if self._videos is None:
            return 0
        around = max(self._marker_bytes(count, VIDEO) for count in (1, self._limits.max_images))
        return around + self._videos.marker_tokens(self._limits.max_video_frames)

    def _marker_bytes(self, count: int, part: pb.Part) -> int:
        """What the template writes for the last of several parts."""
        texts = (render(self._processor, [_empty_message(each, part)]) for each in (count, count - 1))
        last, before = (len(text.encode()) for text in texts)
        return last - before

    def _text_bound(self, inputs: dict[str, Array]) -> int:
        """Upper bound of the tokens of a prompt's text wherever it stands: its bytes, whatever they merge with."""
        tokenizer = self._processor.tokenizer
        added, tokens = tokenizer.added_tokens_decoder, inputs["input_ids"][0][~self._visual(inputs)].tolist()
        words = [token for token in tokens if token not in added]
        text = tokenizer.decode(words, clean_up_tokenization_spaces=False)
        return len(tokens) - len(words) + len(text.encode())

    def _check_messages(self, messages: Sequence[pb.Message]) -> None:
        # joined: the template puts the parts of a message together, and so would a reserved token that was cut in two
        texts = ["".join(part.text for part in message.parts) for message in messages]
        visuals = sum(not part.HasField("text") for message in messages for part in message.parts)
        if not any(text.strip() for text in texts):
            raise InvalidRequestError("the prompt has no text", reason="EMPTY_PROMPT")
        for message in messages:
            if message.role not in ROLES:
                raise InvalidRequestError(f"a role is one of {', '.join(ROLES)}, not {message.role!r}")
            if any(part.WhichOneof("part") is None for part in message.parts):
                raise InvalidRequestError("a message part is neither text nor image nor video")
            if message.role != "user" and not all(part.HasField("text") for part in message.parts):
                raise InvalidRequestError(
                    f"images and videos belong into messages of the user, not of the {message.role}"
                )
        if messages[-1].role != "user":
            raise InvalidRequestError("the last message must come from the user")
        if visuals > self._limits.max_images:
            raise InvalidRequestError(f"{visuals} images and videos; at most {self._limits.max_images} are allowed")
        self._check_texts(texts)

    def _check_texts(self, texts: Sequence[str]) -> None:
        limit = self._limits.context_tokens
        if sum(len(text) for text in texts) > limit * MAX_BYTES_PER_TOKEN:
            raise ContextTooLongError(f"the text is far longer than the context of {limit} tokens")
        # the tokenizer would take it for the real token: a forged image, or the end of a turn
        for token in self._reserved:
            if any(token in text for text in texts):
                raise InvalidRequestError(f"the text contains the reserved token {token!r}", reason="RESERVED_TOKEN")

    def _process(self, text: str, images: list[Image.Image]) -> dict[str, Array]:
        # one list per conversation: some families show several images of one in less detail
        shown = [images] if images else None
        # the template writes the special tokens itself
        encoded = self._processor(images=shown, text=[text], add_special_tokens=False, return_tensors="np")
        return {name: _compact(name, array) for name, array in encoded.items() if name not in UNUSED_INPUTS}

    def _shown(self, messages: Sequence[pb.Message], images: Sequence[Image.Image]) -> list[Image.Image | Clip]:
        """Images and videos in the prompt's order."""
        opened, videos, shown = iter(images), 0, list[Image.Image | Clip]()
        most, to_the_end = self._limits.max_video_frames, bool(self._family.video and self._family.video.to_the_end)
        for part in (part for message in messages for part in message.parts):
            if part.HasField("image"):
                shown.append(next(opened))
            elif part.HasField("video"):
                self._check_video()
                shown.append(open_clip(part.video, videos, max_frames=most, to_the_end=to_the_end))
                videos += 1
        return shown

    def _check_video(self) -> None:
        if self._videos is None:
            known = ", ".join(video_families())
            raise InvalidRequestError(
                f"{self._limits.model_type} models read no videos here; {known} do", reason="VIDEO_MODEL"
            )

    def _inputs(self, text: str, shown: Sequence[Image.Image | Clip]) -> tuple[dict[str, Array], list[Block]]:
        images = [each for each in shown if isinstance(each, Image.Image)]
        if len(images) < len(shown):
            assert self._videos is not None
            return self._videos.inputs(text, shown)
        inputs = self._process(text, images)
        if not self._family.mrope:
            return inputs, []
        merged = self._processor.image_processor.merge_size
        patches = inputs.get("image_grid_thw", np.empty((0, 3), np.int64)).tolist()
        return inputs, [Block((0,), rows // merged, columns // merged) for _, rows, columns in patches]

    def _positions(self, inputs: dict[str, Array], blocks: Sequence[Block]) -> Positions:
        visual = self._visual(inputs)
        return block_positions(visual, blocks) if self._family.mrope else plain_positions(len(visual))

    def _views(self, inputs: dict[str, Array], shown: Sequence[Image.Image | Clip]) -> tuple[int, ...]:
        images = [each.size for each in shown if isinstance(each, Image.Image)]
        if len(images) == len(shown):
            return image_views(self._processor, images)
        return tuple(inputs["image_grid_thw"].prod(axis=1).tolist())

    def _check_context(self, num_tokens: int, max_new_tokens: int) -> None:
        limit = self._limits.context_tokens
        if num_tokens + max_new_tokens > limit:
            raise ContextTooLongError(
                f"the prompt has {num_tokens} tokens and max_new_tokens is {max_new_tokens}; the context is {limit}"
            )

    def _grids(self, inputs: dict[str, Array], shown: Sequence[Image.Image | Clip]) -> tuple[ImageGrid, ...]:
        sizes = [each.size if isinstance(each, Image.Image) else None for each in shown]
        return image_grids(self._processor, self._family, self._visual(inputs), inputs, sizes)

    def _visual(self, inputs: dict[str, Array]) -> NDArray[np.bool_]:
        return np.isin(inputs["input_ids"][0], self._limits.visual_token_ids)


def _compact(name: str, array: Array) -> Array:
    """A mask of pixels comes as large integers, which would take more memory than the pixels."""
    return np.ascontiguousarray(array, dtype=bool if name == "pixel_attention_mask" else None)


def _hash(inputs: dict[str, Array]) -> int:
    seed = xxhash.xxh3_64()
    for name in sorted(inputs):
        seed.update(inputs[name].data)
    return seed.intdigest()


def _empty_message(count: int, part: pb.Part = IMAGE) -> pb.Message:
    return pb.Message(role="user", parts=[*[part] * count, pb.Part(text="")])
