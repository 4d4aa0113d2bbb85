"""Try the wheel and the sdist as a user gets them: make dist-test.

Builds both, installs each into an environment of its own, and runs there, far from the sources: the
README's code, the README's demo, `cometrt doctor`, and the compiler over a kernel of the package.

    python -m tests.dist --python python3.12
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tests.blocks import blocks_of
from tests.launch import ROOT

EXTRAS = "mpi,cli,compile"
COMPILE = """
from cometrt.kernels.compiler import compile_cubin, kernels_folder
import cometrt, sys
found = sorted(str(path.relative_to(kernels_folder())) for path in kernels_folder().rglob("*.cu*"))
assert found == sys.argv[1].split(","), found
compile_cubin(kernels_folder() / "protocol" / "publish.cu")
print(cometrt.__version__, cometrt.__file__)
"""


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    result = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=env | variables, text=True, timeout=900,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if result.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{result.stdout}")
    return result.stdout


def readme_code() -> str:
    """The README's blocks that need no JAX."""
    blocks = (block.text for block in blocks_of("README.md") if block.language == "python")
    return "\n".join(text for text in blocks if "jax" not in text)


def try_out(distribution: Path, python: str, folder: Path) -> None:
    """Install it into a new environment, and run what the README promises."""
    place = folder / distribution.suffix.lstrip(".")
    elsewhere = place / "elsewhere"
    elsewhere.mkdir(parents=True)
    run(python, "-m", "venv", place / "venv", cwd=place)
    bin_folder = place / "venv" / "bin"
    inside = bin_folder / "python"
    run(inside, "-m", "pip", "install", "-q", f"{distribution}[{EXTRAS}]", cwd=elsewhere)
    kernels = sorted(
        str(path.relative_to(ROOT / "kernels_cu")) for path in (ROOT / "kernels_cu").rglob("*.cu*")
    )
    cache = {"COMETRT_CACHE_DIR": str(place / "cache")}
    said = run(inside, "-c", COMPILE, ",".join(kernels), cwd=elsewhere, **cache)
    version, where = said.split()
    assert Path(where).is_relative_to(place), where
    (elsewhere / "readme.py").write_text(readme_code())
    run(inside, "readme.py", cwd=elsewhere, **cache)
    mpirun = bin_folder / "mpirun"
    run(mpirun, "-n", "2", inside, "-m", "mpi4py", "readme.py", cwd=elsewhere, **cache)
    demo = ("demo", "--scale", "16", "--ranks", "2", "--device", "host")
    assert "agrees" in run(inside, "-m", "cometrt", *demo, cwd=elsewhere, **cache)
    run(bin_folder / "cometrt", "doctor", cwd=elsewhere, **cache)
    about = run(inside, "-c", "import platform; print(platform.python_version())", cwd=elsewhere)
    print(f"{distribution.name}: cometrt {version} works with Python {about.strip()}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="of the environments")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(sys.executable, "-m", "build", "-o", folder / "dist", ROOT, cwd=folder)
        for distribution in sorted((folder / "dist").iterdir()):
            if distribution.suffix == ".whl":
                names = zipfile.ZipFile(distribution).namelist()
                assert "cometrt/kernels_cu/README.md" in names
            try_out(distribution, args.python, folder)


if __name__ == "__main__":
    main()
