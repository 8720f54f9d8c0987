"""The whole model with the kernels, in the interpreter, against the model as people write it."""

from __future__ import annotations

import os

import pytest
import torch

if not os.environ.get("TRITON_INTERPRET"):
    pytest.skip("the interpreter wants a process of its own", allow_module_level=True)

from benchmarks.literal import Literal
from tests.model.test_literal import learned, make


@pytest.mark.parametrize("frames", ["mean", "shared"])
def test_the_kernels_path_is_the_plain_one(frames):
    """float32: logits, and the norm of every parameter's gradient difference, within 1e-5 relative."""
    ours, plain = make(frames, "triton"), make(frames, "sdpa")
    logits, grads = learned(ours, ours)
    expected, truth = learned(Literal(plain), plain)
    assert (logits - expected).norm() <= 1e-5 * expected.norm()
    total = torch.stack([grad.norm() for grad in truth.values()]).norm()
    assert grads.keys() == truth.keys()
    for name, grad in truth.items():
        assert (grads[name] - grad).norm() <= 1e-5 * max(grad.norm(), 1e-3 * total), name
