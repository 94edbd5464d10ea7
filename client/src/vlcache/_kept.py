"""Which tokens of a prompt were kept, and where those of the images lie."""

from dataclasses import dataclass

from vlcache.v1 import inference_pb2


@dataclass(frozen=True, kw_only=True)
class ImageGrid:
    """The visual tokens of one image: `rows` times `columns`, row after row; 0 times 0 where they are no grid over it,
    because the model reads it as several views that overlap.

    first_token: place of the first of them in the prompt.
    box: what they cover: left, top, right, bottom in shares of the upright image's width and height; less than 0 to 1
        where the model saw it cropped, more where it was padded.
    """

    first_token: int
    rows: int
    columns: int
    box: tuple[float, float, float, float]

    @property
    def tokens(self) -> range:
        """Places of all of them in the prompt."""
        return range(self.first_token, self.first_token + self.rows * self.columns)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Which tokens of the prompt were kept.

    num_kv_heads: KV heads of each layer.
    layers: per layer and token of the prompt, how many of the layer's KV heads kept it.
    images: in the order in which the model reads them.
    """

    num_kv_heads: int
    layers: tuple[tuple[int, ...], ...]
    images: tuple[ImageGrid, ...]


def kept_from_proto(message: inference_pb2.KeptTokens) -> Kept:
    """Reads the message of the contract."""
    return Kept(
        num_kv_heads=message.num_kv_heads,
        layers=tuple(map(tuple, message.layers)),
        images=tuple(map(_grid, message.images)),
    )


def _grid(message: inference_pb2.ImageGrid) -> ImageGrid:
    return ImageGrid(
        first_token=message.first_token,
        rows=message.rows,
        columns=message.columns,
        box=(message.left, message.top, message.right, message.bottom),
    )
