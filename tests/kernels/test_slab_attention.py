"""Appending and attending over ragged slabs, by torch and by the native kernel, against float64."""

from __future__ import annotations

import ctypes
import os
import shlex
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.kernels.native import slab_attention as native
from shared.kernels.native.build import build
from shared.kernels.native.library import gomp_parallel, slab_attention_function
from shared.kernels.reference import slab_attention as reference
from shared.kernels.reference.slab_attention import SharedSlabs
from tests.kernels.instruction_sets import function_of, runnable
from tests.kernels.slabs import Slabs, make_slabs

Attention = Callable[..., torch.Tensor]
# bf16 in torch rounds the weights too, the kernel only the result
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 4e-3}
TORCH_TOLERANCE = TOLERANCE | {torch.bfloat16: 2e-2}
RAGGED = [[1, 2], [63, 64], [65, 200], [1000, 3]]


@pytest.fixture(scope="module")
def library() -> Path:
    try:
        return build(shlex.split(os.environ.get("CC") or "cc"))
    except OSError:
        pytest.skip("no C compiler")


@pytest.fixture(params=runnable())
def kernel(request: pytest.FixtureRequest, library: Path, monkeypatch: pytest.MonkeyPatch) -> Attention:
    """The native kernel as compiled for each instruction set of this processor."""
    function = function_of(library, request.param)
    monkeypatch.setattr(native, "slab_attention_function", lambda: function)
    monkeypatch.setattr(reference, "slab_attention", refused)
    return native.slab_attention


@pytest.fixture
def loaded(library: Path) -> Iterator[Attention]:
    """The native kernel as the service runs it."""
    slab_attention_function.cache_clear()
    assert native.available()
    threads = torch.get_num_threads()
    yield native.slab_attention
    torch.set_num_threads(threads)


@pytest.fixture(params=["native", "torch"])
def attention(request: pytest.FixtureRequest) -> Attention:
    return request.getfixturevalue("loaded") if request.param == "native" else reference.slab_attention


def refused(*arguments: object) -> torch.Tensor:
    raise AssertionError("the reference was called")


def check(attention: Attention, slabs: Slabs, tolerance: float) -> None:
    out = attention(*slabs.fresh())
    assert out.dtype == slabs.query.dtype
    assert out.shape == slabs.query.shape
    np.testing.assert_allclose(out.double().numpy(), slabs.expected(), atol=tolerance, rtol=tolerance)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", TORCH_TOLERANCE)
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("order", ["even", "backwards", "shuffled"])
@pytest.mark.parametrize("lengths", [RAGGED, [[5, 5, 5], [70, 70, 1], [7, 8, 8]]])
def test_torch_attends(dtype: torch.dtype, group: int, order: str, lengths: list[list[int]]) -> None:
    check(reference.slab_attention, make_slabs(lengths, group, 24, dtype, order=order), TORCH_TOLERANCE[dtype])


def test_torch_takes_heads_of_one_length_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def counted(query: torch.Tensor, *rest: torch.Tensor, **options: float) -> torch.Tensor:
        calls.append(query.shape[1])
        return attend(query, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    reference.slab_attention(*make_slabs([[5, 5, 5], [9, 9, 4]], 2, 16, torch.float32, order="even").fresh())
    assert calls == [3, 2, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 17])
@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 80, 96, 128, 256])
def test_the_kernel_attends(kernel: Attention, dtype: torch.dtype, group: int, head_dim: int) -> None:
    check(kernel, make_slabs(RAGGED, group, head_dim, dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("length", range(1, 70))
def test_every_remainder_of_a_block(kernel: Attention, length: int) -> None:
    check(kernel, make_slabs([[length]], 7, 32, torch.float32), TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_new_row_is_written_and_nothing_else(attention: Attention, dtype: torch.dtype) -> None:
    slabs = make_slabs(RAGGED, 3, 48, dtype)
    arguments = slabs.fresh()
    attention(*arguments)
    assert torch.equal(bits(arguments[3]), bits(slabs.appended()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaling", [0.01, 1.7, 1e4])
def test_scaling_up_to_logits_that_would_overflow(kernel: Attention, dtype: torch.dtype, scaling: float) -> None:
    slabs = make_slabs(RAGGED, 4, 32, dtype, scaling=scaling)
    # a logit of 1e5 has an error of 0.01 in fp32, which the exponential turns into one of 1 %
    check(kernel, slabs, max(TOLERANCE[dtype], 2e-7 * scaling * 32))


@pytest.mark.parametrize("slope", [-1.0, 1.0])
def test_peaks_that_come_first_or_last(kernel: Attention, slope: float) -> None:
    slabs = make_slabs([[500]], 5, 16, torch.float32, scaling=1.0)
    slabs.query.fill_(1.0)
    begin = int(slabs.key_at)
    ramp = slope * torch.linspace(-3, 3, 499)
    slabs.pool[begin : begin + 499 * 16] = ramp.repeat_interleave(16)
    check(kernel, slabs, 1e-5)


def test_equal_logits_give_the_mean(kernel: Attention) -> None:
    slabs = make_slabs([[130, 1]], 2, 64, torch.float32)
    slabs.query.zero_()
    check(kernel, slabs, TOLERANCE[torch.float32])


def test_a_nan_in_the_prompt_is_not_hidden(kernel: Attention) -> None:
    slabs = make_slabs([[40, 40]], 2, 16, torch.float32)
    slabs.pool[int(slabs.key_at[0, 1]) + 7] = torch.nan
    out = kernel(*slabs.fresh())
    assert out.isnan().all(dim=-1).tolist() == [[False, False, True, True]]


def test_views_are_accepted(attention: Attention) -> None:
    slabs = make_slabs(RAGGED, 2, 32, torch.bfloat16)
    query, key, value, pool, key_at, value_at, lengths, scaling = slabs.fresh()
    strided = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in (query, key, value)]
    places = [part.T.contiguous().T for part in (key_at - 5, value_at - 5, lengths)]
    assert torch.equal(attention(*strided, pool[5:], *places, scaling), attention(*slabs.fresh()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_equals_its_sequences_alone(loaded: Attention, dtype: torch.dtype) -> None:
    slabs = make_slabs(RAGGED, 7, 64, dtype)
    together = loaded(*slabs.fresh())
    alone = [loaded(*slabs.alone(sequence).fresh()) for sequence in range(len(RAGGED))]
    assert torch.equal(bits(together), bits(torch.cat(alone)))


@pytest.mark.parametrize("threads", [2, 3, 64])
def test_threads_change_nothing(loaded: Attention, threads: int) -> None:
    slabs = make_slabs(RAGGED * 8, 4, 64, torch.bfloat16)
    torch.set_num_threads(1)
    single = loaded(*slabs.fresh())
    torch.set_num_threads(threads)
    for _ in range(20):
        arguments = slabs.fresh()
        assert torch.equal(bits(loaded(*arguments)), bits(single))
        assert torch.equal(bits(arguments[3]), bits(slabs.appended()))


@pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="torch without OpenMP")
def test_threads_are_those_of_torch(loaded: Attention) -> None:
    torch.set_num_threads(2)
    torch.randn(1 << 20).sin()
    threads, seen = os.listdir("/proc/self/task"), set()
    note = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: seen.add(str(threading.get_native_id())))
    parallel = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)(gomp_parallel())
    parallel(ctypes.cast(note, ctypes.c_void_p), None, 2, 0)
    assert len(seen) == 2
    assert seen <= set(threads)


@pytest.mark.parametrize(
    ("dtype", "head_dim"), [(torch.float16, 64), (torch.float64, 64), (torch.float32, 24), (torch.bfloat16, 272)]
)
def test_what_the_kernel_does_not_serve_runs_on_torch(loaded: Attention, dtype: torch.dtype, head_dim: int) -> None:
    slabs = make_slabs([[5, 70], [1, 2]], 2, head_dim, dtype)
    assert torch.equal(loaded(*slabs.fresh()), reference.slab_attention(*slabs.fresh()))


def test_without_the_library_torch_attends_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("shared.kernels.native.library.library_path", lambda: tmp_path / "missing.so")
    slab_attention_function.cache_clear()
    slabs = make_slabs(RAGGED, 2, 64, torch.bfloat16)
    for _ in range(2):
        assert torch.equal(native.slab_attention(*slabs.fresh()), reference.slab_attention(*slabs.fresh()))
    assert not native.available()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    slab_attention_function.cache_clear()


def test_without_openmp_one_thread_does_it(loaded: Attention, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "gomp_parallel", lambda: None)
    torch.set_num_threads(2)
    check(loaded, make_slabs(RAGGED, 2, 64, torch.float32), TOLERANCE[torch.float32])


def apart(slabs: Slabs, share: list[list[int]]) -> tuple[list[torch.Tensor | float], SharedSlabs]:
    """The same rows with the first `share` of each head elsewhere, and NaN where they were."""
    head_dim, pool = slabs.query.shape[-1], slabs.pool.clone()
    pieces, end, begins = [pool], len(pool), []
    for at in (slabs.key_at, slabs.value_at):
        begins.append(torch.empty_like(at))
        for sequence, head in np.ndindex(*slabs.lengths.shape):
            begin, count = int(at[sequence, head]), share[sequence][head] * head_dim
            pieces.append(pool[begin : begin + count].clone())
            pool[begin : begin + count] = torch.nan
            begins[-1][sequence, head] = end
            end += count
    rows = torch.tensor(share)
    own_at = [at + rows * head_dim for at in (slabs.key_at, slabs.value_at)]
    shared = SharedSlabs(begins[0], begins[1], rows)
    arguments = [slabs.query, slabs.key, slabs.value, torch.cat(pieces), *own_at, slabs.lengths, slabs.scaling]
    return arguments, shared


# none of them, a block's worth, around the seams of blocks, all but the new one
SHARES = [[[0, 1], [32, 31], [64, 199], [33, 2]], [[0, 0], [62, 1], [0, 0], [999, 0]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("share", SHARES)
def test_shared_rows_are_read_as_if_all_lay_in_one_piece_bit_by_bit(
    kernel: Attention, dtype: torch.dtype, group: int, share: list[list[int]]
) -> None:
    slabs = make_slabs(RAGGED, group, 64, dtype)
    whole = kernel(*slabs.fresh())
    arguments, shared = apart(slabs, share)
    before = arguments[3].clone()
    assert torch.equal(bits(kernel(*arguments, shared)), bits(whole))
    changed = (bits(arguments[3]) != bits(before)).view(-1, dtype.itemsize).any(dim=1)
    assert int(changed.sum()) <= 2 * slabs.lengths.numel() * 64, "nothing but the new rows is written"
    assert not changed[len(slabs.pool) :].any(), "what is shared stays as it is"


@pytest.mark.parametrize("share", SHARES)
def test_the_reference_reads_them_too(share: list[list[int]]) -> None:
    slabs = make_slabs(RAGGED, 2, 16, torch.float64)
    arguments, shared = apart(slabs, share)
    out = reference.slab_attention(*arguments, shared)
    np.testing.assert_allclose(out.numpy(), slabs.expected(), atol=1e-12, rtol=1e-12)
