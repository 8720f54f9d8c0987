"""Attention of frames that meet in bottleneck tokens, on one packed matrix of query, key and value rows.

Rows of the packed input, C clips of T frames of N tokens and Z bottleneck tokens each:

    0 ... C*T*N           token (clip c, frame t, token n) is row (c*T + t)*N + n
    C*T*N ... + C*Z       bottleneck (clip c, token z) is row C*T*N + c*Z + z

so that a projection that makes it is a single matrix product and no row is ever moved. What attends what:

| `frames` | tokens of a frame see | bottleneck tokens see | bottleneck rows of the output |
|---|---|---|---|
| `joint` | all tokens of the clip, the bottleneck | the same | C*Z |
| `shared` | their own frame, the bottleneck | all tokens of the clip, the bottleneck | C*Z |
| `mean` | their own frame, the bottleneck | one copy per frame: that frame, the bottleneck | C*T*Z |

With one frame all three are the same. `mean` returns the copies, row C*T*N + (c*T + t)*Z + z of each: they are
averaged by the caller, after whatever else the layer does to them (SSW60's frames, which pass a layer one by one).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from fastav_kernels.bottleneck_attention.reference import reference

Frames = Literal["mean", "shared", "joint"]

IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {"reference": reference}


def implementation(impl: str = "auto") -> str:
    """Returns the implementation that `impl` stands for.

    Raises:
        ValueError: where it is unknown, with those that there are.
    """
    if impl == "auto":
        return "reference"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f'impl "{impl}" is unknown; there is: auto, {", ".join(sorted(IMPLEMENTATIONS))}')
    return impl


def bottleneck_attention(
    qkv: Tensor,
    *,
    clips: int,
    num_frames: int,
    num_tokens: int,
    num_bottleneck: int,
    frames: Frames,
    impl: str = "auto",
) -> Tensor:
    """Computes softmax(q k^T / sqrt(d)) v over the segments that each row may see (table at the top).

    Args:
        qkv: [C*T*N + C*Z, 3, H, d] of any floating dtype: queries, keys and values of H heads, packed as
            above.
        clips: C.
        num_frames: T, at least 1.
        num_tokens: N tokens of a frame, at least 1.
        num_bottleneck: Z, 0 for plain attention.
        frames: Which segments there are.
        impl: One of `IMPLEMENTATIONS`, or `auto` for the best one here.

    Returns:
        [C*T*N + C*Z, H, d] in the same order of rows; with `mean` [C*T*N + C*T*Z, H, d].

    Raises:
        ValueError: where `impl` or `frames` is unknown or `qkv` does not have the rows that it should.
    """
    attend = IMPLEMENTATIONS[implementation(impl)]
    if frames not in ("mean", "shared", "joint"):
        raise ValueError(f'frames "{frames}" is unknown; there is: mean, shared, joint')
    if min(clips, num_frames, num_tokens) < 1 or num_bottleneck < 0:
        raise ValueError(
            f"clips {clips}, num_frames {num_frames}, num_tokens {num_tokens} must be at least 1 and "
            f"num_bottleneck {num_bottleneck} at least 0"
        )
    rows = clips * (num_frames * num_tokens + num_bottleneck)
    if qkv.ndim != 4 or qkv.shape[0] != rows or qkv.shape[1] != 3:
        raise ValueError(f"qkv is {list(qkv.shape)}; [{rows}, 3, heads, head_dim] expected")
    if not qkv.is_floating_point():
        raise ValueError(f"qkv is {qkv.dtype}; a floating dtype expected")
    return attend(
        qkv,
        clips=clips,
        num_frames=num_frames,
        num_tokens=num_tokens,
        num_bottleneck=num_bottleneck,
        frames=frames,
    )
