"""Reads checkpoints of the authors' MBT (scenic) and converts their parameters to those of fusion kind `mbt`.

A checkpoint is one msgpack map written by flax. It is read without flax or jax, and no code in it is run. The parameter
tree is a flat mapping here: `Transformer/encoderblock_0/LayerNorm_0/scale` -> array. In scenic, names of spectrogram
parameters end in `spectrogram`, linear kernels are [in, out], convolutions [..., in, out], and attention is split by
head.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastav.core.errors import UserError

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


_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3  # flax's msgpack extensions
_PLACES = (("optimizer", "target", "params"), ("optimizer", "target"), ("params", "params"), ("params",), ())
_CHUNKED = "__msgpack_chunked_array__"


def read_checkpoint(path: Path) -> dict[str, NDArray[Any]]:
    """Reads the parameters of a flax checkpoint; the versions keep them in different places.

    Returns:
        The flat tree.

    Raises:
        UserError: The file cannot be read, is not a flax checkpoint, or contains no transformer.
    """
    try:
        whole = msgspec.msgpack.decode(path.read_bytes(), ext_hook=_extension)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not a flax checkpoint (msgpack): {error}") from None
    for place in _PLACES:
        found = whole
        for key in place:
            found = found.get(key) if isinstance(found, dict) else None
        if isinstance(found, dict) and isinstance(found.get("Transformer"), dict):
            try:
                return dict(_flat(found, ""))
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{path}: an array cannot be read: {error}") from None
    keys = ", ".join(map(str, whole)) if isinstance(whole, dict) else type(whole).__name__
    raise UserError(f"{path}: contains no parameters of a Transformer; its keys are: {keys or 'none'}")


def _extension(code: int, data: memoryview) -> Any:
    """Decodes flax's msgpack extensions: arrays, scalars and complex numbers."""
    if code == _COMPLEX:
        return complex(*msgspec.msgpack.decode(data))
    if code not in (_ARRAY, _SCALAR):
        raise ValueError(f"unknown msgpack extension {code}")
    shape, name, raw = msgspec.msgpack.decode(data)
    if name == "bfloat16":  # not a NumPy type: the upper half of a float32
        values = np.frombuffer(raw, np.uint16).astype(np.uint32) << 16
        return values.view(np.float32).reshape(shape)
    dtype = np.dtype(name)
    if dtype.kind not in "fiubc":
        raise ValueError(f"unsupported array type {name}")
    return np.frombuffer(raw, dtype).reshape(shape)


def _flat(tree: Mapping[str, Any], place: str) -> Iterator[tuple[str, NDArray[Any]]]:
    for name, value in tree.items():
        if isinstance(value, dict) and _CHUNKED in value:  # flax splits arrays larger than 1 GiB
            chunks, shape = value["chunks"], value["shape"]
            joined = np.concatenate([chunks[str(i)] for i in range(len(chunks))])
            yield place + name, joined.reshape([int(shape[str(i)]) for i in range(len(shape))])
        elif isinstance(value, dict):
            yield from _flat(value, f"{place}{name}/")
        elif isinstance(value, np.ndarray):
            yield place + name, value
        else:
            raise ValueError(f"{place}{name} is a {type(value).__name__}, expected an array")


def mbt_state(tree: Tree) -> dict[str, Tensor]:
    """Converts a parameter tree to the state dict of a model with fusion `mbt`, in the tree's dtype.

    Raises:
        UserError: The tree has a parameter that MBT does not have.
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
            raise UserError(f'unknown parameter "{name}"; not part of scenic\'s MBT')
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
            raise UserError(f'unknown parameter "{name}" in an encoder block; not part of scenic\'s MBT')
    kernels = [block[f"{_ATTENTION}{part}/kernel"].reshape(width, -1).T for part in _PARTS]
    yield "attn.qkv.weight", _tensor(np.concatenate(kernels))
    yield "attn.qkv.bias", _tensor(np.concatenate([block[f"{_ATTENTION}{part}/bias"].reshape(-1) for part in _PARTS]))


def _tensor(value: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.array(value, order="C"))
