"""The Triton kernels on a GPU: `pytest -m gpu tests/kernels/test_gpu.py`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from fastav.media.spectrogram import Frontend
from fastav.model.av_model import AVModel, Inputs, Model
from fastav.model.fusion import Bottleneck
from fastav.model.tower import TowerConfig
from fastav_kernels.bottleneck_attention import IMPLEMENTATIONS, Segments, bottleneck_attention
from tests import ROOT
from tests.helpers.attention_cases import KINDS, error, exact, packed, small, words

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device"),
]
SHAPES = [(2, 8, 197, 4), (4, 1, 201, 4), (2, 3, 65, 5), (2, 8, 50, 0), (1, 2, 577, 4)]
CASES = [
    Segments(*shape, kind, need_bottleneck) for shape in SHAPES for kind in KINDS for need_bottleneck in (True, False)
]


def run(impl, qkv, segments, dout):
    qkv = qkv.clone().requires_grad_()
    out = IMPLEMENTATIONS[impl](qkv, segments)
    out.backward(dout)
    return out.detach(), qkv.grad


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that nobody wrote is NaN, not nought."""
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(float("nan")))


@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("segments", CASES, ids=str)
def test_bfloat16_is_as_near_to_float64_as_sdpa(segments, dim, poisoned):
    qkv = packed(segments, 2, dim, torch.bfloat16)
    out, grad, dout = exact(qkv, segments)
    qkv, low = qkv.cuda(), dout.to("cuda", torch.bfloat16)
    out, grad = out.cuda(), grad.cuda()
    mine, theirs = run("triton", qkv, segments, low), run("sdpa", qkv, segments, low)
    for found, other, true in zip(mine, theirs, (out, grad), strict=True):
        assert found.isfinite().all()
        assert error(found, true) <= 2 * max(error(other, true), 2e-3)
    again = run("triton", qkv, segments, low)
    assert all(torch.equal(a, b) for a, b in zip(mine, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("segments", small(), ids=str)
def test_other_dtypes_and_edges(segments, dtype, poisoned):
    qkv = packed(segments, 2, 64, dtype)
    out, grad, dout = exact(qkv, segments)
    found, dqkv = run("triton", qkv.cuda(), segments, dout.to("cuda", dtype))
    limit = 1e-5 if dtype == torch.float32 else 2e-3
    assert error(found.cpu(), out) <= limit
    assert error(dqkv.cpu(), grad) <= limit


@pytest.mark.parametrize("kind", KINDS)
def test_inductor_compiles_it_as_one_graph(kind):
    segments = Segments(2, 8, 197, 4, kind)
    qkv = packed(segments, 2, 64, torch.bfloat16).cuda().requires_grad_()

    def attend(x):
        return bottleneck_attention(x * 2.0, **words(segments), impl="triton") + 1.0

    out = torch.compile(attend, fullgraph=True)(qkv)
    torch.testing.assert_close(out, attend(qkv))
    dout = torch.randn(out.shape[::-1], device="cuda", dtype=out.dtype).permute(2, 1, 0)  # as no kernel lays it out
    (found,) = torch.autograd.grad(out, qkv, dout)
    (expected,) = torch.autograd.grad(attend(qkv), qkv, dout)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("frames", ["shared", "mean"])
def test_a_compiled_model_under_autocast_agrees_with_sdpa(frames):
    fusion = {name: Bottleneck(start=1, frames=frames, attention=name) for name in ("triton", "sdpa")}
    tower = TowerConfig(
        name="vit_tiny_patch16_224", args={"patch_size": 8, "embed_dim": 128, "depth": 3, "num_heads": 2}
    )
    images = torch.randint(0, 256, (2, 3, 3, 32, 32), dtype=torch.uint8, device="cuda")
    mel, found = torch.randn(2, 1, 1, 16, 24, device="cuda") * 20 - 40, {}
    for name, kind in fusion.items():
        torch.manual_seed(0)
        config, inputs = Model(video=tower, audio=tower, fusion=kind), Inputs(3, 32, 16, 24)
        model = AVModel(config, ("a", "b"), inputs, Frontend(num_mels=16, mean=-40.0, std=20.0)).cuda()
        with torch.autocast("cuda", torch.bfloat16):
            logits = torch.compile(model, fullgraph=True)(images, mel)
        logits.square().sum().backward()
        found[name] = [logits.detach(), *(p.grad for p in model.parameters() if p.ndim > 1)]
    for mine, other in zip(found["triton"], found["sdpa"], strict=True):
        assert error(mine, other.double()) <= 5e-2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_need_not_be_on_the_current_device():
    segments = Segments(2, 3, 65, 5, "shared")
    qkv = packed(segments, 2, 64, torch.float32)
    out, grad, dout = exact(qkv, segments)
    found, dqkv = run("triton", qkv.to("cuda:1"), segments, dout.to("cuda:1", torch.float32))
    assert error(found.cpu(), out) <= 1e-5
    assert error(dqkv.cpu(), grad) <= 1e-5


def test_rows_beyond_32_bits():
    """Offsets of more than 2^31 elements: 1.3 million rows of 3 x 12 x 64."""
    segments = Segments(800, 8, 197, 4, "shared")
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB")
    qkv = torch.randn(segments.in_rows, 3, 12, 64, device="cuda", dtype=torch.bfloat16)
    out = IMPLEMENTATIONS["triton"](qkv, segments)
    one = Segments(1, 8, 197, 4, "shared")
    last = torch.cat([qkv[segments.token_rows - 8 * 197 : segments.token_rows], qkv[-4:]])
    expected = IMPLEMENTATIONS["triton"](last, one)
    assert torch.equal(out[segments.token_rows - 8 * 197 : segments.token_rows], expected[: 8 * 197])
    assert torch.equal(out[-4:], expected[-4:])


_SANITISED = """
import torch
from fastav_kernels.bottleneck_attention import IMPLEMENTATIONS, Segments
from tests.helpers.attention_cases import packed
for shape in [(2, 3, 50, 4), (1, 1, 201, 4), (1, 2, 300, 5)]:
    for kind in ("shared", "mean", "joint"):
        segments = Segments(*shape, kind)
        qkv = packed(segments, 1, 64, torch.bfloat16).cuda().requires_grad_()
        IMPLEMENTATIONS["triton"](qkv, segments).sum().backward()
torch.cuda.synchronize()
"""


def test_no_access_out_of_bounds(tmp_path):
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not on the PATH")
    script = tmp_path / "run.py"
    script.write_text(_SANITISED)
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, str(script)]
    path = os.pathsep.join([str(ROOT), f"{ROOT}/kernels", *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, env=environment, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout
