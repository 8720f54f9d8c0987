"""Compiles kernels for a GPU architecture, without needing a GPU, and reports the resources they use."""

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
    """Resources that one program of a compiled kernel uses.

    Attributes:
        registers: Registers per thread, at most 255. Fewer than 16 means that the kernel was compiled to a trap.
        stack: Bytes of stack per thread, for values that did not fit into registers.
        shared: Bytes of shared memory.
        instructions: Number of instructions by mnemonic in the machine code.
    """

    registers: int
    stack: int
    shared: int
    instructions: Mapping[str, int]

    def count(self, mnemonic: str) -> int:
        """Returns the number of instructions with this mnemonic, such as `HGMMA` (tensor cores of sm_90) or `HMMA`."""
        return self.instructions.get(mnemonic, 0)


def compile_kernel(
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
        kernel: Function decorated by `triton.jit`, without the interpreter.
        types: Types of the arguments that are not constants, such as `*bf16`, `fp32`, `i32`. Pointers are taken as
            aligned to 16 bytes.
        constants: Values of the other arguments.
        architecture: Architecture, such as `sm_90`.
        num_warps: Number of warps of a launch.
        num_stages: Number of pipeline stages of a launch.
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
    binary = triton.compile(source, target=target, options={"num_warps": num_warps, "num_stages": num_stages})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(binary.asm["cubin"])
        usage_text = _run_tool("cuobjdump", "--dump-resource-usage", str(file))
        code = _run_tool("nvdisasm", "-c", str(file))
    resources = dict(re.findall(r"(REG|STACK):(\d+)", usage_text))
    instructions: dict[str, int] = {}
    for mnemonic in re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", code, re.MULTILINE):
        instructions[mnemonic] = instructions.get(mnemonic, 0) + 1
    return Usage(int(resources["REG"]), int(resources["STACK"]), binary.metadata.shared, instructions)


def _run_tool(tool: str, *words: str) -> str:
    return subprocess.run([str(_TOOLS / tool), *words], capture_output=True, text=True, check=True).stdout
