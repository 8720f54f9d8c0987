"""Bottleneck attention against attention with a dense mask, row by row, in float64."""

import re
from pathlib import Path

import pytest
import torch

import fastav_kernels
from fastav_kernels import bottleneck_attention
from fastav_kernels.bottleneck_attention import IMPLEMENTATIONS, Segments, best
from fastav_kernels.bottleneck_attention.reference import allowed
from tests.helpers.attention_cases import KINDS, error, exact, small, words
from tests.helpers.attention_cases import packed as packed_of


def dense(qkv, C, T, N, Z, frames):
    """The same by its definition: one softmax over all rows of the packed matrix, masked; copies of the bottleneck."""
    rows = [("token", c, t, n) for c in range(C) for t in range(T) for n in range(N)]
    where = {row: number for number, row in enumerate(rows)}
    first = C * T * N
    bottleneck = {(c, z): first + c * Z + z for c in range(C) for z in range(Z)}

    def tokens(c, t):
        times = range(T) if frames == "joint" or t is None else [t]
        return [where["token", c, s, n] for s in times for n in range(N)]

    queries = [(where[row], row[1], row[2]) for row in rows]
    times = range(T) if frames == "mean" else [None]
    queries += [(bottleneck[c, z], c, t) for c in range(C) for t in times for z in range(Z)]
    allowed = torch.zeros(len(queries), qkv.shape[0], dtype=torch.bool)
    for i, (_, c, t) in enumerate(queries):
        allowed[i, tokens(c, t) + [bottleneck[c, z] for z in range(Z)]] = True
    q, k, v = qkv.permute(1, 2, 0, 3)
    scores = q[:, [i for i, _, _ in queries]] @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    return (scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ v).transpose(0, 1)


def packed(C, T, N, Z, H=2, d=4, dtype=torch.float64):
    return packed_of(Segments(C, T, N, Z, "shared"), H, d, dtype)


def run(qkv, C, T, N, Z, frames, impl="reference"):
    return bottleneck_attention(qkv, clips=C, num_frames=T, num_tokens=N, num_bottleneck=Z, frames=frames, impl=impl)


@pytest.mark.parametrize("frames", KINDS)
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 1, 1, 1), (3, 1, 7, 2), (2, 4, 1, 3), (2, 3, 5, 0)])
def test_equals_dense_masked_attention(frames, shape):
    qkv = packed(*shape)
    out = run(qkv, *shape, frames)
    C, T, N, Z = shape
    assert out.shape == (C * T * N + C * Z * (T if frames == "mean" else 1), 2, 4)
    torch.testing.assert_close(out, dense(qkv, *shape, frames), rtol=0, atol=1e-14)


def test_one_frame_is_the_same_in_all_kinds():
    qkv = packed(3, 1, 6, 4)
    mean, shared, joint = (run(qkv, 3, 1, 6, 4, kind) for kind in KINDS)
    torch.testing.assert_close(mean, joint, rtol=0, atol=0)
    torch.testing.assert_close(shared, joint, rtol=0, atol=1e-15)


def test_more_frames_are_not():
    qkv = packed(2, 3, 5, 4)
    tokens = 2 * 3 * 5
    mean, shared, joint = (run(qkv, 2, 3, 5, 4, kind) for kind in KINDS)
    torch.testing.assert_close(mean[:tokens], shared[:tokens])
    assert (joint[:tokens] - shared[:tokens]).abs().max() > 0.01
    torch.testing.assert_close(joint[tokens:], shared[tokens:])
    averaged = mean[tokens:].unflatten(0, (2, 3, 4)).mean(1).flatten(0, 1)
    assert (averaged - shared[tokens:]).abs().max() > 0.01


@pytest.mark.parametrize("frames", KINDS)
def test_gradients(frames):
    qkv = packed(2, 2, 3, 2, H=1, d=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: run(x, 2, 2, 3, 2, frames), qkv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    exact = run(packed(2, 3, 5, 4), 2, 3, 5, 4, "shared")
    out = run(packed(2, 3, 5, 4, dtype=dtype), 2, 3, 5, 4, "shared")
    assert out.dtype == dtype
    error = (out.double() - exact).norm() / exact.norm()
    assert error < 4 * torch.finfo(dtype).eps


def test_compiles_as_one_graph():
    compiled = torch.compile(lambda x: run(x, 2, 3, 5, 4, "shared"), backend="aot_eager", fullgraph=True)
    qkv = packed(2, 3, 5, 4, dtype=torch.float32)
    torch.testing.assert_close(compiled(qkv), run(qkv, 2, 3, 5, 4, "shared"))


@pytest.mark.parametrize("impl", ["sdpa", "masked", "flex", "auto"])
@pytest.mark.parametrize("segments", small(), ids=str)
def test_what_is_composed_equals_the_reference(segments, impl):
    qkv = packed_of(segments, 2, 32, torch.float32)
    out, grad, dout = exact(qkv, segments)
    qkv.requires_grad_(impl != "flex")  # has no gradient on a CPU
    found = bottleneck_attention(qkv, **words(segments), impl=impl)
    assert error(found.detach(), out) < 1e-6
    if impl != "flex":
        found.backward(dout.float())
        assert error(qkv.grad, grad) < 1e-6


def test_flex_makes_its_mask_once_in_a_compiled_model():
    segments, graphs = Segments(2, 2, 33, 3, "shared"), []

    def kept(graph, inputs):
        graphs.append(str(graph.graph))
        return graph

    compiled = torch.compile(lambda x: IMPLEMENTATIONS["flex"](x, segments), backend=kept, fullgraph=True)
    qkv = packed_of(segments, 2, 16)
    for _ in range(3):
        torch.testing.assert_close(compiled(qkv), IMPLEMENTATIONS["reference"](qkv, segments))
    assert len(graphs) == 2  # the first makes the mask, the second reads it
    assert "arange" in graphs[0]
    assert "arange" not in graphs[1]


def test_sizes_may_change_under_a_compiler():
    def attend(x, N):
        return run(x, 2, 3, N, 4, "shared", "auto")

    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    for N in (5, 7, 9, 11):
        qkv = packed(2, 3, N, 4)
        torch.testing.assert_close(compiled(qkv, N), attend(qkv, N))


def test_pairs_are_those_that_meet():
    for segments in small():
        per_clip = allowed(segments, torch.device("cpu")).sum().item()
        assert segments.pairs == segments.clips * per_clip


def test_without_the_bottlenecks_own_result():
    for kind in KINDS:
        qkv = packed(2, 3, 5, 4)
        whole = run(qkv, 2, 3, 5, 4, kind)
        tokens = bottleneck_attention(qkv, **words(Segments(2, 3, 5, 4, kind, False)), impl="reference")
        torch.testing.assert_close(tokens, whole[:30], rtol=0, atol=1e-14)


def test_wrong_calls_say_what_is_wrong():
    qkv = packed(2, 3, 5, 4)
    with pytest.raises(ValueError, match=r'impl "cuda" is unknown; expected one of: auto, flex, masked, reference'):
        run(qkv, 2, 3, 5, 4, "mean", impl="cuda")
    with pytest.raises(ValueError, match='frames "each" is unknown; expected one of: mean, shared, joint'):
        run(qkv, 2, 3, 5, 4, "each")
    with pytest.raises(ValueError, match=r"qkv has shape \[38, 3, 2, 4\], expected \[34, 3, heads, head_dim\]"):
        run(qkv, 2, 3, 5, 2, "mean")
    with pytest.raises(ValueError, match="which must be at least 1"):
        run(qkv, 2, 0, 5, 2, "mean")
    with pytest.raises(ValueError, match=r"torch\.int64, expected a floating dtype"):
        run(qkv.long(), 2, 3, 5, 4, "mean")
    assert best("cpu", "torch.float32", 64, Segments(2, 8, 197, 4, "shared")) in IMPLEMENTATIONS
    assert run(qkv, 2, 3, 5, 4, "mean", impl="reference").shape[0] == 54


def test_stands_alone():
    sources = list(Path(fastav_kernels.__file__).parent.rglob("*.py"))
    assert len(sources) >= 3
    assert not [p for p in sources if re.search(r"^\s*(from|import) fastav\b(?!_)", p.read_text(), re.MULTILINE)]
