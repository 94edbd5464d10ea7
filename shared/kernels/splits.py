"""How many programs share one KV head's tokens in decode attention."""

from __future__ import annotations

# Programs worth having per multiprocessor: three fit in shared memory at once, one more hides the tail of a wave. Half
# as many, which rounding may leave, still have several times the bytes on their way that its bandwidth needs.
PROGRAMS_PER_SM = 4
# Below this a split costs more in partial results and their merge than its parallelism wins.
MIN_SPLIT_TOKENS = 128
# The merge holds all partial results of a query head in registers.
MAX_SPLITS = 32


def choose_splits(batch: int, num_kv_heads: int, max_length: int, num_sms: int) -> int:
    """A `num_splits` for `paged_attention`; it depends on no device data, so a CUDA graph can be captured with it.

    One program reads the tokens of one (sequence, KV head, split). Splits are added until the device is full, but
    none is made shorter than pays: a sequence shorter than `num_splits * MIN_SPLIT_TOKENS` uses fewer of them.

    Args:
        batch: Sequences in the step, padding rows included.
        num_kv_heads: KV heads of a layer.
        max_length: Most tokens that any KV head of the batch can have while this choice is used.
        num_sms: Multiprocessors of the device.

    Returns:
        A power of two up to MAX_SPLITS: every number of splits is compiled on its own.
    """
    filling = -(-PROGRAMS_PER_SM * num_sms // (batch * num_kv_heads))
    useful = -(-max_length // MIN_SPLIT_TOKENS)
    wanted = max(1, min(filling, useful, MAX_SPLITS))
    return 1 << (wanted.bit_length() - 1)
