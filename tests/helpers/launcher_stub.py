"""What Triton needs of a C compiler before its first kernel, without a GPU: `python -m tests.helpers.launcher_stub`.

It compiles its driver module and a launcher for each kernel against the GPU driver's library, for which one that does
nothing stands in.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import tempfile
from pathlib import Path

from triton.backends.nvidia import driver
from triton.runtime.build import compile_module_from_src


def main() -> None:
    """Compiles and loads both.

    Raises:
        RuntimeError: There is no compiler.
        subprocess.CalledProcessError: It cannot compile them.
    """
    launcher = driver.make_launcher({}, {0: "*fp32", 1: "i32"}, None)
    asked = Path(driver.__file__).with_name("driver.c").read_text() + launcher
    with tempfile.TemporaryDirectory() as folder:
        stand_in = Path(folder, "libcuda.so.1")
        names = sorted(set(re.findall(r"\bcu[A-Z]\w+", asked)))
        Path(folder, "stand_in.c").write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in names))
        compiler = os.environ.get("CC", "gcc")
        words = [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(stand_in), f"{folder}/stand_in.c"]
        subprocess.run(words, check=True)
        os.environ |= {"TRITON_LIBCUDA_PATH": folder, "TRITON_CACHE_DIR": f"{folder}/cache"}
        ctypes.CDLL(str(stand_in))  # found by its name when the modules are loaded
        driver.CudaUtils()
        compile_module_from_src(
            src=launcher, name="__triton_launcher", library_dirs=driver.library_dirs(),
            include_dirs=driver.include_dirs, libraries=driver.libraries,
        )  # fmt: skip
    print(f"{compiler} compiles what Triton needs of it")


if __name__ == "__main__":
    main()
