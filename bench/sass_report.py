"""What the compiler made of the CUDA kernels of a built extension; needs no GPU.

    python bench/sass_report.py [EXTENSION] [--check] [--json FILE]

For every kernel and architecture: registers, shared memory (of match for 8 query heads), bytes
spilled to local memory, CTAs that fit a multiprocessor, instructions, 16-byte loads, asynchronous
copies (LDGSTS) and tensor-core products (HMMA), the last two within amend's main loop, too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # behind the installed mac_attn

from build_support.sass import Kernel, missing, parse  # noqa: E402


def tool_path() -> str:
    """PATH with the folders where the toolkit or PyPI's wheels have cuobjdump and nvdisasm."""
    site = Path(sysconfig.get_paths()["purelib"])
    folders = [str(path) for path in sorted(site.glob("nvidia/cu*/bin"), reverse=True)]
    if home := os.environ.get("CUDA_HOME"):
        folders.append(f"{home}/bin")
    return os.pathsep.join([*folders, os.environ.get("PATH", "")])


def dump(extension: Path, what: str) -> str:
    path = tool_path()
    tool = shutil.which("cuobjdump", path=path)
    if tool is None or shutil.which("nvdisasm", path=path) is None:
        raise SystemExit(
            "cuobjdump and nvdisasm are not on PATH, in CUDA_HOME or among the wheels:\n"
            "    pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
        )
    command = [tool, what, str(extension)]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})
    if run.returncode:
        raise SystemExit(f"{' '.join(command)}: {run.stderr}")
    return run.stdout


def installed_extension() -> Path:
    spec = importlib.util.find_spec("mac_attn._C")
    if spec is None or spec.origin is None:
        raise SystemExit("mac_attn is not built; name the extension")
    return Path(spec.origin)


def row(kernel: Kernel) -> dict[str, object]:
    loop = kernel.main_loop() if kernel.stage == "amend" else []
    return {
        "kernel": kernel.name,
        "arch": kernel.arch,
        "registers": kernel.registers,
        "shared": kernel.static_shared + kernel.dynamic_shared,
        "spilled": kernel.spilled,
        "ctas_per_sm": kernel.ctas,
        "instructions": len(kernel.opcodes),
        "loads_16_bytes": kernel.count(r"LDG\..*128"),
        "async_copies": kernel.count("LDGSTS|UTMALDG"),
        "tensor_core": kernel.count("HMMA"),
        "loop_instructions": len(loop),
        "loop_async_copies": sum("LDGSTS" in o and ".128" in o for o in loop),
        "loop_tensor_core": sum(o.startswith("HMMA") for o in loop),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("extension", type=Path, nargs="?", help="default: the installed one")
    parser.add_argument("--check", action="store_true", help="exit 1 if a kernel is not as it must")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    extension = options.extension or installed_extension()
    kernels = parse(dump(extension, "--dump-resource-usage"), dump(extension, "--dump-sass"))
    if not kernels:
        raise SystemExit(f"{extension} has no CUDA kernels")
    rows = [row(kernel) for kernel in kernels]
    print(
        "kernel                     arch    regs  shared  spilled  CTAs  instructions  LDG.128  "
        "LDGSTS  HMMA  main loop: instructions  LDGSTS  HMMA"
    )
    for r in rows:
        print(
            f"{r['kernel']:26} {r['arch']:7} {r['registers']:4}  {r['shared']:6}  {r['spilled']:7}"
            f"  {r['ctas_per_sm']:4}  {r['instructions']:12}  {r['loads_16_bytes']:7}  "
            f"{r['async_copies']:6}  {r['tensor_core']:4}  {r['loop_instructions']:23}  "
            f"{r['loop_async_copies']:6}  {r['loop_tensor_core']:4}"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    complaints = [complaint for kernel in kernels for complaint in kernel.complaints()]
    complaints += missing(kernels)
    if options.check:
        print("\n".join(complaints) or f"{len(kernels)} kernels: no spills, hot loops as designed")
    return 1 if options.check and complaints else 0


if __name__ == "__main__":
    sys.exit(main())
