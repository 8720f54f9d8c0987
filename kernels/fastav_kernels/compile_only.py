"""Compiles kernels for an architecture on a machine that need not have a GPU, and says what they use of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True, slots=True)
class Usage:
    """What one program of a compiled kernel uses.

    Attributes:
        registers: Of a thread, 255 at most; fewer than 16 is no kernel but a trap.
        stack: Bytes of a thread: what had no room in the registers.
        shared: Bytes of shared memory.
        instructions: How often each mnemonic is in the machine code.
    """

    registers: int
    stack: int
    shared: int
    instructions: Mapping[str, int]

    def count(self, mnemonic: str) -> int:
        """How many instructions are of this mnemonic: `HGMMA` of the tensor cores of sm_90, `HMMA` of older ones."""
        return self.instructions.get(mnemonic, 0)


def compiled(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    architecture: str,
    *,
    num_warps: int,
    num_stages: int,
) -> Usage:
    """Compiles a kernel.

    Args:
        kernel: Made by `triton.jit`, not by the interpreter.
        types: Of its arguments that are no constants, such as `*bf16`, `fp32`, `i32`; pointers are to whole 16 bytes.
        constants: Its other arguments.
        architecture: Such as `sm_90`.
        num_warps: As at a launch.
        num_stages: As at a launch.
    """
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")},
    )
    target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    made = triton.compile(source, target=target, options={"num_warps": num_warps, "num_stages": num_stages})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(made.asm["cubin"])
        resources = _say("cuobjdump", "--dump-resource-usage", str(file))
        code = _say("nvdisasm", "-c", str(file))
    told = dict(re.findall(r"(REG|STACK):(\d+)", resources))
    instructions: dict[str, int] = {}
    for mnemonic in re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", code, re.MULTILINE):
        instructions[mnemonic] = instructions.get(mnemonic, 0) + 1
    return Usage(int(told["REG"]), int(told["STACK"]), made.metadata.shared, instructions)


def _say(tool: str, *words: str) -> str:
    return subprocess.run([str(_TOOLS / tool), *words], capture_output=True, text=True, check=True).stdout
