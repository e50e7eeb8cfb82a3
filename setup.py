"""Builds the extension mac_attn._C; everything else about the package is in pyproject.toml.

Environment:
    MAC_ATTN_CUDA=0|1       leave the CUDA kernels out, or insist on them
    CUDA_HOME               the toolkit to build with
    TORCH_CUDA_ARCH_LIST    the GPUs to build for, default 8.0;9.0+PTX
    MAC_ATTN_SANITIZE=LIST  e.g. address,undefined: an instrumented build for tests
    MAX_JOBS                compilers at a time
"""

import os
import runpy
import sys
import sysconfig
from pathlib import Path

import setuptools

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT))  # pip does not, and build_support lies here

from build_support.compiler import (  # noqa: E402
    check_platform,
    compiler_family,
    flags,
    links_openmp,
)
from build_support.toolkit import (  # noqa: E402
    DEFAULT_ARCHES,
    BuildError,
    check_setuptools,
    check_torch,
    find_toolkit,
    runtime_folder,
    use_cuda,
)

try:
    check_platform()
    check_setuptools(setuptools.__version__)
except BuildError as error:
    raise SystemExit(f"mac_attn: {error}") from error
# torch looks for ninja on PATH, where the scripts of a Python that is called by its path are not.
os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
try:
    import torch
except ModuleNotFoundError as error:
    raise SystemExit(
        "mac_attn is built against the torch it runs with, which an isolated build does not see:"
        " install torch first, then\n    pip install --no-build-isolation ."
    ) from error

cuda_sources = sorted(ROOT.glob("csrc/cuda/*.cu"))
library_dirs = []
try:
    check_torch(torch.__version__)
    wanted = os.environ.get("MAC_ATTN_CUDA") != "0"
    toolkit = find_toolkit(torch.version.cuda) if wanted else None
    cuda = use_cuda(torch.version.cuda, bool(cuda_sources), toolkit)
    chosen = flags(compiler_family(), links_openmp(), os.environ.get("MAC_ATTN_SANITIZE", ""))
    if cuda:
        library_dirs = [str(runtime_folder(toolkit, ROOT / "build" / "cuda-lib"))]
except BuildError as error:
    raise SystemExit(f"mac_attn: {error}") from error
if chosen.note:
    print(f"mac_attn: {chosen.note}", file=sys.stderr)
if cuda:
    os.environ["CUDA_HOME"] = str(toolkit)  # before torch's module looks for one itself
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHES)

from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402

version = runpy.run_path(str(ROOT / "mac_attn" / "_version.py"))["__version__"]
macros = [("MAC_ATTN_VERSION", f'"{version}"'), ("MAC_ATTN_TORCH", f'"{torch.__version__}"')]
sources = [*sorted(ROOT.glob("csrc/*.cpp")), *sorted(ROOT.glob("csrc/cpu/*.cpp"))]
arguments = {"cxx": list(chosen.compile)}
if cuda:
    sources += cuda_sources
    macros += [
        ("MAC_ATTN_WITH_CUDA", "1"),
        ("MAC_ATTN_CUDA_ARCHES", f'"{os.environ["TORCH_CUDA_ARCH_LIST"]}"'),
    ]
    arguments["nvcc"] = ["-O3", "--expt-relaxed-constexpr", "-Xptxas=-v"]
else:
    sources = [path for path in sources if path.name != "backend_cuda.cpp"]

# One build for every Python from 3.10 on. Those without a GIL have no such ABI before 3.15.
limited_api = not sysconfig.get_config_var("Py_GIL_DISABLED")

setuptools.setup(
    # The torch of the build and no other: what is imported says so, and installers should know.
    install_requires=[f"torch=={torch.__version__.partition('+')[0]}", "numpy"],
    ext_modules=[
        (CUDAExtension if cuda else CppExtension)(
            "mac_attn._C",
            # Relative, as setuptools wants them in a source distribution.
            [str(path.relative_to(ROOT)) for path in sources],
            depends=[str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/**/*.*h"))],
            define_macros=macros,
            library_dirs=library_dirs,
            # Left out with py_limited_api; csrc/python_tensor.cpp is what needs it.
            libraries=["torch_python"],
            py_limited_api=limited_api,
            extra_compile_args=arguments,
            extra_link_args=list(chosen.link),
        )
    ],
    cmdclass={"build_ext": BuildExtension.with_options(no_python_abi_suffix=False)},
    # A library newer than its sources may still be another torch's. Ninja knows what to compile.
    options={
        "build_ext": {"force": True},
        **({"bdist_wheel": {"py_limited_api": "cp310"}} if limited_api else {}),
    },
)
