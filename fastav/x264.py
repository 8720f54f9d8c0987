"""x264's parameters that make its bytes the same on every x86-64 machine, in every process and each time."""

from __future__ import annotations

import platform


def same_bytes(machine: str) -> str:
    """Returns what every encoder of ours adds to its `x264-params`; threads must be 1 besides.

    `cpu-independent=1` is x264's own switch for it. Left to itself, x264

    - runs macroblock-tree rate control in assembly that is not exact: its reciprocals are approximate, and the
      AVX-512 version works on eight macroblocks at a time and lets those behind the right edge of the picture, whose
      memory holds anything, give their weight to macroblocks within. Pictures of 448, 96 and 64 pixels' width have
      such macroblocks (28, 6 and 4 are no multiples of 8): B-frames or not, streams then differ from encode to encode;
    - tries other intra modes on CPUs with SSSE3 than without, so that streams differ even without AVX-512.

    With the switch, streams equal those of x264's plain C code (`asm=0`) at every level of assembly. Against the
    default, on AVX2, they are 0.2 % (synth's settings, 448 x 256), 0.3 % (groups of 4) and 0.6 % (all-intra) larger.

    `asm=SSE4.2` keeps every AVX-512 path out, without asking what the CPU can do: x264 does not check that it has what
    is named, but numpy and torch do not start without SSE4.2 (x86-64-v2). Other architectures do not know the name.

    Args:
        machine: As `platform.machine()` says.
    """
    return "cpu-independent=1" + (":asm=SSE4.2" if machine.lower() in ("x86_64", "amd64") else "")


SAME_BYTES = same_bytes(platform.machine())
"""Of this machine."""
