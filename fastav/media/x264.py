"""Parameters that make x264 give the same bytes on every x86-64 machine, in every process, each time."""

from __future__ import annotations

import platform


def same_bytes(machine: str) -> str:
    """Returns the parameters that every encoder of this project adds to `x264-params`. It must also use one thread.

    `cpu-independent=1` is x264's own switch for this. Without it, streams differ for two reasons:

    - Rate control by macroblock tree uses AVX-512 code, which processes eight macroblocks of a row at once, even at the
      end of a row with fewer. The macroblocks beyond the right edge are arbitrary memory. They add weight to the
      macroblocks that their motion vectors point to. This affects pictures whose width is not a multiple of eight
      macroblocks, such as 448, 96 and 64 pixels (28, 6 and 4 macroblocks per row), with and without B-frames. Their
      streams can differ from one encode to the next. On an AMD EPYC with AVX-512, 30 encodes of 19 test clips gave 3
      and 5 different streams for two of the clips, and one stream for every clip with the switch.
    - Intra modes are tried in a different order on CPUs with SSSE3, so streams also differ between older CPUs.

    With the switch, streams equal those of x264's plain C code (`asm=0`) with any assembly level. Compared to the
    default on a CPU with AVX2, at 448 x 256, encoding takes 1.14 times the CPU time for preset `fast` of packs and 1.0
    to 1.1 times for the other settings, and streams are 0.3 to 0.6 % larger. (`asm=0` takes 3 times as long.)

    `asm=SSE4.2` excludes AVX-512 code as a second safeguard. x264 does not check whether the CPU has SSE4.2, but numpy
    and PyArrow require it anyway. AVX2 was at most 3 % faster. Other architectures do not have this option value.

    Args:
        machine: Value of `platform.machine()`.
    """
    return "cpu-independent=1" + (":asm=SSE4.2" if machine.lower() in ("x86_64", "amd64") else "")


SAME_BYTES = same_bytes(platform.machine())
"""The parameters for this machine."""
