"""The kernels in Triton's interpreter, against float64; run by `test_bottleneck_attention.py` in its own process."""

from __future__ import annotations

import itertools
import os

import pytest
import torch

if not os.environ.get("TRITON_INTERPRET"):
    pytest.skip("the interpreter wants a process of its own", allow_module_level=True)

from fastav_kernels import bottleneck_attention
from fastav_kernels.bottleneck_attention import Segments, launch, op
from fastav_kernels.bottleneck_attention.plans import ARCHITECTURES, Chip
from tests.helpers.attention_cases import KINDS, error, exact, packed, small, words

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that nobody wrote is NaN, not nought."""
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(float("nan")))


def check(segments, dtype, dim, heads=1, chip=None):
    qkv = packed(segments, heads, dim, dtype)
    out, grad, dout = exact(qkv, segments)
    found, lse = launch.run_forward(qkv, segments, chip)
    assert torch.isfinite(lse).all()
    assert error(found, out) <= TOLERANCE[dtype]
    dqkv = launch.run_backward(dout.to(dtype), qkv, found, lse, segments, chip)
    assert error(dqkv, grad) <= TOLERANCE[dtype]
    first = segments.token_rows
    for mine, true in ((found, out), *((dqkv[:, i], grad[:, i]) for i in range(3))):
        assert error(mine[first:], true[first:]) <= 2 * TOLERANCE[dtype] or true[first:].norm() == 0
    return max(error(found, out), error(dqkv, grad))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("segments", small(), ids=str)
def test_small_ones(segments, dtype):
    check(segments, dtype, 32)


@pytest.mark.parametrize(("chip", "dim"), list(itertools.product(ARCHITECTURES, (32, 64, 128))))
def test_plans_of_each_architecture(chip, dim):
    for dtype in TOLERANCE:
        check(Segments(1, 2, 30, 4, "shared"), dtype, dim, 1, Chip(chip))


@pytest.mark.parametrize("kind", KINDS)
def test_long_sequences_take_the_kernels_of_any_length(kind):
    check(Segments(1, 2, 260, 4, kind), torch.float16, 32)
    check(Segments(1, 2, 30, 4, kind), torch.float16, 64, chip=Chip("sm_90", 50_000))  # a chip with little memory


def test_two_runs_give_the_same_bits():
    segments = Segments(2, 3, 21, 4, "shared")
    qkv = packed(segments, 2, 32, torch.float16)
    one, two = (launch.run_forward(qkv, segments) for _ in range(2))
    assert all(map(torch.equal, one, two))
    grads = [launch.run_backward(qkv[: len(one[0]), 0].contiguous(), qkv, *one, segments) for _ in range(2)]
    assert torch.equal(*grads)


def test_many_heads_and_clips_do_not_mix():
    check(Segments(3, 2, 9, 3, "shared"), torch.float32, 32, heads=3)
    check(Segments(3, 2, 9, 3, "mean"), torch.float32, 32, heads=3)


def test_large_scores_do_not_overflow():
    segments = Segments(1, 2, 20, 4, "shared")
    qkv = packed(segments, 1, 32, torch.float32) * 30
    out, grad, dout = exact(qkv, segments)
    found, lse = launch.run_forward(qkv, segments)
    assert error(found, out) < 1e-4
    assert error(launch.run_backward(dout.float(), qkv, found, lse, segments), grad) < 1e-3


def test_rows_that_are_not_contiguous_are_right():
    segments = Segments(2, 2, 5, 2, "shared")
    wide = packed(segments, 2, 64, torch.float32)
    qkv = wide[..., ::2]
    assert not qkv.is_contiguous()
    out, _, _ = exact(qkv, segments)
    assert error(bottleneck_attention(qkv, **words(segments), impl="triton"), out) < 1e-5


def test_it_is_an_operator_of_pytorch():
    segments = Segments(1, 2, 5, 2, "shared")
    qkv = packed(segments, 1, 32, torch.float32)
    sizes = (1, 2, 5, 2, "shared", True)
    torch.library.opcheck(op.forward, (qkv.clone().requires_grad_(), *sizes))
    out, lse = op.forward(qkv, *sizes)
    torch.library.opcheck(op.backward, (torch.ones_like(out), qkv, out, lse, *sizes))


def test_it_compiles_as_one_graph():
    segments = Segments(1, 2, 5, 2, "shared")
    qkv = packed(segments, 1, 32, torch.float32).requires_grad_()
    out, grad, dout = exact(qkv.detach(), segments)

    def attend(x):
        return bottleneck_attention(x * 1.0, **words(segments), impl="triton")

    found = torch.compile(attend, backend="aot_eager", fullgraph=True)(qkv)
    found.backward(dout.float())
    assert error(found.detach(), out) < 1e-5
    assert error(qkv.grad, grad) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bottleneck", [0, 1, 4, 5])
@pytest.mark.parametrize("frames", [1, 3, 8])
@pytest.mark.parametrize("tokens", [1, 50, 65, 196, 197, 201])
def test_every_size(tokens, frames, bottleneck, kind, record_property):
    for dtype in TOLERANCE:
        worst = check(Segments(1, frames, tokens, bottleneck, kind), dtype, 64)
        record_property(str(dtype).removeprefix("torch."), worst)
