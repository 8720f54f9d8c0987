"""x264's parameters that make its bytes the same on every x86-64 machine, in every process and each time."""

from __future__ import annotations

import platform


def same_bytes(machine: str) -> str:
    """Returns what every encoder of ours adds to its `x264-params`; threads must be 1 besides.

    `cpu-independent=1` is x264's own switch for it. Left to itself, x264

    - lets AVX-512 code do the macroblock-tree rate control, which takes eight macroblocks of a row at once, also where
      fewer are left: those behind the right edge, whose memory holds the next row or anything, give their weight to
      those within that their motion vectors point to. Pictures 448, 96 and 64 pixels wide have such (rows of 28, 6 and
      4 macroblocks), with B-frames or without: streams then differ from encode to encode;
    - tries intra modes in another way on CPUs with SSSE3 than without: streams differ even without AVX-512.

    With the switch, streams are those of x264's plain C code (`asm=0`), whatever the level of assembly. Against the
    default on a CPU with AVX2, at 448 x 256, encoding takes 1.14 of the CPU time for the packs' `fast`, 1.0 to 1.1 for
    the other settings, and streams are 0.3 to 0.6 % larger. (`asm=0` takes 3 times as long.)

    `asm=SSE4.2` keeps AVX-512 out altogether. It needs no look at the CPU: x264 does not check that a CPU has what is
    named, but numpy and PyArrow do not start without SSE4.2. AVX2 was no more than 3 % faster. Other architectures do
    not know the name.

    Args:
        machine: As `platform.machine()` says.
    """
    return "cpu-independent=1" + (":asm=SSE4.2" if machine.lower() in ("x86_64", "amd64") else "")


SAME_BYTES = same_bytes(platform.machine())
"""Of this machine."""
