"""The model as people write it gives what ours gives: logits and gradients, in float64 and float32."""

from __future__ import annotations

import pytest
import torch

from benchmarks.__main__ import main as benchmark
from benchmarks.literal import Literal
from fastav.media.spectrogram import Frontend
from fastav.model.av_model import AVModel, Inputs, Model
from fastav.model.fusion import Bottleneck
from fastav.model.tower import TowerConfig

ARGS = {"patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2, "init_values": 0.5}
INPUTS = Inputs(frames=3, image_size=32, num_mels=16, window=24)


def make(frames, attention):
    torch.manual_seed(0)
    tower = TowerConfig(name="vit_tiny_patch16_224", args=ARGS)
    config = Model(video=tower, audio=tower, fusion=Bottleneck(start=2, frames=frames, attention=attention))
    model = AVModel(config, "abcde", INPUTS, Frontend(num_mels=16, mean=-40.0, std=20.0))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def batch():
    generator = torch.Generator().manual_seed(2)
    frames = torch.randint(0, 256, (2, 3, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return frames, torch.randn(2, 1, 1, 16, 24, generator=generator) * 20 - 40


def learned(model, parameters):
    logits = model(*batch())
    logits.square().sum().backward()
    return logits.detach(), {name: p.grad for name, p in parameters.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("frames", ["mean", "shared"])
@pytest.mark.parametrize("attention", ["sdpa", "masked", "reference"])
def test_the_fused_path_is_the_plain_one(frames, attention):
    """Whole model, float32: logits, and the norm of every parameter's gradient difference, within 1e-5 relative."""
    ours, plain = make(frames, attention), make(frames, "sdpa")
    logits, grads = learned(ours, ours)
    expected, truth = learned(Literal(plain), plain)
    assert (logits - expected).norm() <= 1e-5 * expected.norm()
    assert grads.keys() == truth.keys()
    assert len(grads) > 60
    total = torch.stack([grad.norm() for grad in truth.values()]).norm()
    for name, grad in truth.items():
        # A gradient that is nought but for rounding, such as that of the keys' biases, is held against all of them.
        assert (grads[name] - grad).norm() <= 1e-5 * max(grad.norm(), 1e-3 * total), name


@pytest.mark.parametrize("suite", ["kernels", "model"])
def test_the_suites_check_on_a_machine_without_a_gpu(suite, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    words = ["--only", "8 frames of 65"] if suite == "kernels" else ["--frames", "shared"]
    assert benchmark([suite, *words, "--out", str(tmp_path / "found.json")]) == 0
    shown = capsys.readouterr().out
    assert "nothing was timed" in shown
    assert (tmp_path / "found.json").is_file()


def test_tuning_needs_a_gpu(capsys):
    if not torch.cuda.is_available():
        assert benchmark(["kernels", "--tune"]) == 2
        assert "needs a CUDA device" in capsys.readouterr().err
