"""The names and layouts of scenic's MBT: from the authors' parameter tree to the parameters of kind `mbt`.

A tree is flat here: `Transformer/encoderblock_0/LayerNorm_0/scale` -> array. What is of the spectrogram ends in
`spectrogram` there; linear kernels are [in, out], convolutions [..., in, out], attention is split by head.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastav.errors import UserError

Tree = Mapping[str, NDArray[Any]]

_BLOCK = re.compile(r"Transformer/encoderblock_(\d+)(_spectrogram)?/(.+)")
_WHOLE = {
    "bottleneck": "fusion.bottleneck",
    "cls": "fusion.class_token.video",
    "clsspectrogram": "fusion.class_token.audio",
    "Transformer/posembed_input/pos_embedding": "fusion.position.video",
    "Transformer/posembed_input_spectrogram/pos_embedding": "fusion.position.audio",
    "Transformer/encoder_norm/scale": "fusion.norm.weight",
    "Transformer/encoder_norm/bias": "fusion.norm.bias",
    "embedding/bias": "fusion.embed.video.bias",
    "embedding_spectrogram/bias": "fusion.embed.audio.bias",
    "pre_logits/bias": "fusion.hidden.bias",
    "output_projection/bias": "fusion.head.bias",
}
_LINEAR = {"pre_logits/kernel": "fusion.hidden.weight", "output_projection/kernel": "fusion.head.weight"}
_PATCHES = {
    "embedding/kernel": "fusion.embed.video.weight",
    "embedding_spectrogram/kernel": "fusion.embed.audio.weight",
}
_IN_BLOCK = {
    "LayerNorm_0/scale": "norm1.weight", "LayerNorm_0/bias": "norm1.bias",
    "LayerNorm_1/scale": "norm2.weight", "LayerNorm_1/bias": "norm2.bias",
    "MlpBlock_0/Dense_0/bias": "mlp.fc1.bias", "MlpBlock_0/Dense_1/bias": "mlp.fc2.bias",
    "MultiHeadDotProductAttention_0/out/bias": "attn.proj.bias",
}  # fmt: skip
_LINEAR_IN_BLOCK = {"MlpBlock_0/Dense_0/kernel": "mlp.fc1.weight", "MlpBlock_0/Dense_1/kernel": "mlp.fc2.weight"}
_ATTENTION = "MultiHeadDotProductAttention_0/"
_PARTS = ("query", "key", "value")


def mbt_state(tree: Tree) -> dict[str, Tensor]:
    """Returns the parameters of a model of kind `mbt` by name, in the tree's dtype.

    Raises:
        UserError: The tree has a name that MBT has not.
    """
    state: dict[str, Tensor] = {}
    blocks: dict[str, dict[str, NDArray[Any]]] = {}
    for name, value in tree.items():
        found = _BLOCK.fullmatch(name)
        if found:
            modality = "audio" if found[2] else "video"
            blocks.setdefault(f"{modality}.net.blocks.{found[1]}", {})[found[3]] = value
        elif name in _WHOLE:
            state[_WHOLE[name]] = _tensor(value)
        elif name in _LINEAR:
            state[_LINEAR[name]] = _tensor(value.T)
        elif name in _PATCHES:
            axes = (value.ndim - 1, value.ndim - 2, *range(value.ndim - 2))
            state[_PATCHES[name]] = _tensor(value.transpose(axes))
        else:
            raise UserError(f'"{name}" is no parameter of scenic\'s MBT')
    for place, block in blocks.items():
        state.update((f"{place}.{name}", value) for name, value in _block(block))
    return state


def _block(block: Mapping[str, NDArray[Any]]) -> Iterator[tuple[str, Tensor]]:
    """Yields the parameters of one encoder block under timm's names."""
    width = len(block["LayerNorm_0/scale"])
    for name, value in block.items():
        if name in _IN_BLOCK:
            yield _IN_BLOCK[name], _tensor(value)
        elif name in _LINEAR_IN_BLOCK:
            yield _LINEAR_IN_BLOCK[name], _tensor(value.T)
        elif name == f"{_ATTENTION}out/kernel":
            yield "attn.proj.weight", _tensor(value.reshape(-1, width).T)
        elif not name.startswith(_ATTENTION):
            raise UserError(f'"{name}" is no parameter of a block of scenic\'s MBT')
    kernels = [block[f"{_ATTENTION}{part}/kernel"].reshape(width, -1).T for part in _PARTS]
    yield "attn.qkv.weight", _tensor(np.concatenate(kernels))
    yield "attn.qkv.bias", _tensor(np.concatenate([block[f"{_ATTENTION}{part}/bias"].reshape(-1) for part in _PARTS]))


def _tensor(value: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.array(value, order="C"))
