"""The compiled graph of a fusion layer: no matrix product, no kernel and no copy that a plain layer has not."""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from torch import Tensor, nn
from torch._inductor.utils import get_code

import fastav.model.bottleneck_block
from fastav.model.bottleneck_block import use_bottleneck_blocks
from fastav.model.tower import TowerConfig
from fastav.model.transforms import mask_bands, normalise_frames, normalise_mel

# What is looked at is Inductor's code; tracing its compiler costs a quarter more time.
pytestmark = pytest.mark.no_cover
C, T, N, Z, D = 2, 4, 17, 4, 64


@torch.library.custom_op("fastav_test::attention", mutates_args=())
def attention(qkv: Tensor, rows: int) -> Tensor:
    """Stands in for the attention, which is an operator of its own in the graph."""
    return torch.cat([qkv, qkv])[:rows].sum(1)


@attention.register_fake
def _(qkv: Tensor, rows: int) -> Tensor:
    return qkv.new_empty(rows, *qkv.shape[2:])


@torch.library.custom_op("fastav_test::attention_backward", mutates_args=())
def attention_backward(dout: Tensor, rows: int) -> Tensor:
    """Its gradient."""
    grown = dout.new_zeros(2 * rows, *dout.shape[1:])
    grown[: len(dout)] = dout
    return (grown[:rows] + grown[rows:]).unsqueeze(1).repeat(1, 3, 1, 1)


@attention_backward.register_fake
def _(dout: Tensor, rows: int) -> Tensor:
    return dout.new_empty(rows, 3, *dout.shape[1:])


def _keep(ctx, inputs, output):
    ctx.rows = len(inputs[0])


attention.register_autograd(
    lambda ctx, dout: (attention_backward(dout.contiguous(), ctx.rows), None), setup_context=_keep
)


class Plain(nn.Module):
    """A layer of as many rows in one matrix."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, rows):
        block = self.block
        qkv = block.attn.qkv(block.norm1(rows)).view(len(rows), 3, block.attn.num_heads, -1)
        rows = rows + block.attn.proj(attention(qkv, len(rows)).flatten(1))
        return rows + block.mlp(block.norm2(rows))


def tower(depth=2):
    torch.manual_seed(0)
    args = {"patch_size": 8, "embed_dim": D, "depth": depth, "num_heads": 2}
    return TowerConfig(name="vit_tiny_patch16_224", args=args).build(
        modality="video", input_size=(32, 32), num_classes=0
    )


def bodies_of(run, *inputs):
    """What Inductor's code of the forward pass calls, and that of the backward pass where there is one.

    It is written and not compiled: that takes no compiler, and a fraction of the time.
    """
    compiled = torch.compile(run, fullgraph=True)

    def lowered(*inputs):
        with contextlib.suppress(AssertionError):  # what stands in for the compiled code returns nothing
            compiled(*inputs)

    # A compiler is neither asked what the processor can nor looked for: whatever tells its version will do.
    settings = {"force_disable_caches": True, "cpp.vec_isa_ok": True, "cpp.cxx": (sys.executable,)}
    torch._dynamo.reset()
    with (
        torch._inductor.config.patch(settings),
        torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
    ):
        codes = get_code(lowered, *inputs)
    return [code[code.index("def call") :] for code in codes if "def call" in code]


def calls(run, *inputs):
    """What the compiled forward and backward passes call, of each: (matrix products, kernels, kernels that only sum).

    None of the others may do nothing but move numbers: the names say what went into them.
    """
    bodies = bodies_of(run, *inputs)
    assert len(bodies) == 2
    for name in re.findall(r"^ *(cpp_fused\w*)\(", "".join(bodies), re.MULTILINE):
        assert re.search("layer_norm|gelu|sum|add(?!mm)|mean|mul|div", name), f"{name} copies"
    products, others, sums = r"^ *(?:buf\d+ = )?extern_kernels\.\w*mm\(", r"^ *cpp_fused\w*\(", r"^ *cpp_fused_sum\w*\("
    return [tuple(len(re.findall(what, body, re.MULTILINE)) for what in (products, others, sums)) for body in bodies]


@functools.cache
def plain_calls(depth):
    """The same of layers of one matrix, of as many rows as tokens and bottleneck together."""
    layers = [Plain(block) for block in tower(depth).blocks]

    def through_plain(rows):
        for layer in layers:
            rows = layer(rows)
        return (rows,)

    return calls(through_plain, torch.randn(C * T * N + C * Z, D, requires_grad=True))


@pytest.mark.parametrize("frames", ["shared", "joint", "mean"])
def test_fusion_layers_have_the_graph_of_plain_ones(frames, monkeypatch):
    """Two layers of tokens and bottleneck against two of one matrix of as many rows."""

    def stand_in(qkv, *, clips, num_frames, num_tokens, num_bottleneck, frames, need_bottleneck, impl):
        copies = num_frames if frames == "mean" else 1
        rows = clips * num_frames * num_tokens + (clips * copies * num_bottleneck if need_bottleneck else 0)
        return attention(qkv, rows)

    monkeypatch.setattr(fastav.model.bottleneck_block, "bottleneck_attention", stand_in)
    x, z = torch.randn(C, T, N, D, requires_grad=True), torch.randn(C, Z, D, requires_grad=True)

    def both(depth):
        fused = tower(depth)
        use_bottleneck_blocks(fused, 0, frames, "sdpa", last_needs_bottleneck=True)

        def through_fused(x, z):
            for layer in fused.blocks:
                x, z = layer(x, z, C)
            return x, z

        return plain_calls(depth), calls(through_fused, x, z)

    (forward, backward), (our_forward, our_backward) = both(2)
    assert (forward[0], backward[0]) == (8, 16), "four products a layer, and two for the gradient of each"
    assert (our_forward[0], our_backward[0]) == (8, 16)
    # The mean of the bottleneck's copies is one more for each layer.
    means = 1 if frames == "mean" else 0
    assert our_forward[1] <= forward[1] + 2 * means
    # What comes in of tokens and bottleneck is joined once, where the network ends. Each layer has the kernels of a
    # plain one, and sums of two biases' gradients, which in a plain layer are made beside a LayerNorm's.
    assert our_backward[1] <= backward[1] + 3 + 2 * means
    if frames != "shared":  # tracing takes long: what a further layer adds is looked at for one kind
        return
    (deep_forward, deep_backward), (our_deep_forward, our_deep_backward) = both(3)
    assert our_deep_forward[1] - our_forward[1] <= deep_forward[1] - forward[1]
    grown, ours = (
        [deep[n] - two[n] for n in (1, 2)]
        for deep, two in ((deep_backward, backward), (our_deep_backward, our_backward))
    )
    assert ours[0] - ours[1] <= grown[0] - grown[1], "kernels that do more than sum"
    assert ours[1] <= grown[1] + 2, "sums of biases' gradients"


def normalised(frames):
    """uint8 to normalised frames."""
    return normalise_frames(frames, torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.2, 0.2]))


def masked(mel, band):
    """dB to a normalised and masked spectrogram."""
    return mask_bands(normalise_mel(mel, -40.0, 20.0), band)


FRAMES = torch.arange(2 * 3 * 3 * 32 * 32).remainder(256).to(torch.uint8).view(2, 3, 3, 32, 32)
MEL = torch.linspace(-80, 0, 2 * 16 * 24).view(2, 1, 1, 16, 24), torch.tensor([[0, 3], [2, 7]])


@pytest.mark.parametrize(("run", "given"), [(normalised, (FRAMES,)), (masked, MEL)], ids=["frames", "mel"])
def test_frames_and_spectrograms_are_normalised_by_one_kernel_each(run, given):
    (body,) = bodies_of(run, *given)
    assert len(re.findall(r"^ *cpp_fused\w*\(", body, re.MULTILINE)) == 1
    assert "extern_kernels" not in body


class Embed(nn.Module):
    """The convolution that makes patches, in bfloat16, of frames in uint8."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 8, 8).requires_grad_(False).bfloat16()
        self.mean, self.std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.2, 0.2])

    def forward(self, frames):
        with torch.autocast("cpu", torch.bfloat16):
            return self.patches(normalise_frames(frames[None], self.mean, self.std)[0])


def test_under_autocast_frames_reach_the_patches_in_one_kernel():
    """uint8 to normalised bfloat16 without a float32 copy, before the convolution that makes patches."""
    (body,) = bodies_of(Embed(), FRAMES[0])
    before = body[: body.index("extern_kernels.convolution(")]
    assert len(re.findall(r"^ *cpp_fused\w*\(", before, re.MULTILINE)) == 1


COMPILER = pytest.mark.skipif(
    shutil.which("g++") is None or not Path(sysconfig.get_path("include"), "Python.h").is_file(),
    reason="Inductor wants a C++ compiler and Python's headers to run what it writes",
)


@pytest.mark.parametrize(
    "backend", ["aot_eager_decomp_partition", pytest.param("inductor", marks=[COMPILER, pytest.mark.slow])]
)
def test_compiled_normalisation_gives_the_same_numbers(backend):
    """Of the graph that Inductor is given; and, where there is time to compile PyTorch's headers, of what it writes."""
    torch._dynamo.reset()
    for run, given in ((normalised, (FRAMES,)), (masked, MEL)):
        compiled = torch.compile(run, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(*given), run(*given))
    embed = Embed()
    found = torch.compile(embed, fullgraph=True, backend=backend)(FRAMES[0])
    torch.testing.assert_close(found, embed(FRAMES[0]), rtol=2e-2, atol=2e-2)
