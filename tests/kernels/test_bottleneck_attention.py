"""The Triton kernels on a machine without a GPU: in the interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from importlib import resources

import pytest
import torch

from fastav_kernels import bottleneck_attention
from fastav_kernels.bottleneck_attention import Segments
from fastav_kernels.bottleneck_attention.gate import faults, reduction_usage, usage_of
from fastav_kernels.bottleneck_attention.plans import ARCHITECTURES, KERNELS, Chip, LaunchPlan, plan_for, read_plans
from tests import ROOT
from tests.helpers.attention_cases import packed, words

FRAMES = Segments(64, 8, 197, 4, "shared")


def test_the_interpreter_agrees_with_float64():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/kernels/interpreted",
        "-m",
        "not slow",
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    last = done.stdout.strip().splitlines()[-1]
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in last
    assert "skipped" not in last


@pytest.mark.parametrize("kernel", KERNELS)
def test_sm_90_at_64_channels_fits_the_chip_and_uses_its_tensor_cores(kernel):
    plan = plan_for(kernel, Chip("sm_90"), 64, 2, 201)
    used = usage_of(plan, "sm_90", FRAMES, torch.bfloat16)
    assert used.count("HGMMA") > 0
    assert used.count("HMMA") == 0
    assert used.shared <= plan.shared_bytes <= 227 * 1024
    assert used.stack <= {"forward": 0, "backward_whole": 64}.get(kernel, 0)
    if kernel == "forward":
        assert used.registers <= 128


@pytest.mark.parametrize("architecture", ["sm_80", "sm_100"])
def test_other_architectures_compile(architecture):
    for kernel in ("forward", "backward_whole"):
        plan = plan_for(kernel, Chip(architecture), 64, 2, 201)
        used = usage_of(plan, architecture, FRAMES, torch.float16)
        assert 16 < used.registers <= 255
        assert used.stack <= 64
        assert used.count("HMMA") + used.count("UTCHMMA") > 0


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_plan_compiles(architecture):
    for plan in read_plans(architecture).plans:
        dtype = torch.bfloat16 if plan.num_bytes == 2 else torch.float32
        for kind in ("shared", "mean", "joint"):
            tokens = min(197, plan.max_keys - 4)
            segments = Segments(2, 1 if kind == "joint" else 8, tokens, 4, kind)
            used = usage_of(plan, architecture, segments, dtype)
            told = f"{architecture} {plan} {kind}: {used}"
            assert not faults(plan, architecture, used, dtype), told
            assert used.shared <= plan.shared_bytes, told


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [60, 124, 252])
@pytest.mark.parametrize("kind", ["shared", "joint"])
def test_sm_90_backward_of_up_to_256_keys_hardly_spills(tokens, kind):
    segments = Segments(64, 1 if kind == "joint" else 8, tokens, 4, kind)
    plan = plan_for("backward_whole", Chip("sm_90"), 64, 2, tokens + 4)
    for dtype in (torch.float16, torch.bfloat16):
        assert usage_of(plan, "sm_90", segments, dtype).stack <= 64


def test_what_adds_up_the_parts_of_frames_compiles():
    for kernel in ("merge_parts", "sum_parts"):
        for segments in (FRAMES, Segments(1, 1, 197, 4, "shared"), replace(FRAMES, need_bottleneck=False)):
            used = reduction_usage(kernel, "sm_90", segments, torch.bfloat16, 12, 64)
            assert used.stack == 0
    for segments in (replace(FRAMES, num_bottleneck=0), replace(FRAMES, need_bottleneck=False)):
        plan = plan_for("forward", Chip("sm_90"), 64, 2, 201)
        assert not faults(plan, "sm_90", usage_of(plan, "sm_90", segments, torch.bfloat16), torch.bfloat16)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_there_is_a_plan_for_everything(architecture):
    for dim in (32, 64, 128):
        for num_bytes in (2, 4):
            for kernel in ("forward", "backward_keys", "backward_queries"):
                assert plan_for(kernel, Chip(architecture, 99 * 1024), dim, num_bytes, 100_000)
    text = resources.files("fastav_kernels.bottleneck_attention").joinpath(f"plans/{architecture}.json").read_text()
    told = json.loads(text)
    assert all(set(plan) == {field.name for field in fields(LaunchPlan)} for plan in told["plans"])
    assert told["measured"]


def test_a_forced_kernel_that_cannot_run_says_why():
    segments = Segments(2, 3, 5, 4, "shared")
    for qkv, reason in (
        (packed(segments, 1, 32, torch.float32), "needs an NVIDIA GPU, but the tensors are on cpu"),
        (packed(segments, 1, 48, torch.float32), "takes heads of 32, 64, 128 channels, not 48"),
        (packed(segments, 1, 32), r"takes float32, float16 and bfloat16, not torch\.float64"),
    ):
        with pytest.raises(ValueError, match=f'impl "triton" cannot run: it {reason}'):
            bottleneck_attention(qkv, **words(segments), impl="triton")
