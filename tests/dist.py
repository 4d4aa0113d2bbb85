"""Try the wheel and the sdist as a user gets them: make dist-test.

Builds both, installs each into an environment of its own, and runs there, far from the sources: the
README's code, the README's demo, `cometrt doctor`, and the compiler over a kernel of the package.

    python -m tests.dist --python python3.12

On a GPU machine without a network, each is installed into a folder beside what this Python has:

    python -m tests.dist --gpu --wheel dist/cometrt-*.whl --sdist dist/cometrt-*.tar.gz

The layers run on the GPU then: the demo, the guide's code for CuPy, and an example on two ranks.
Without a build backend the sdist is not installed, but its package is compared with the wheel's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from tests.blocks import blocks_of
from tests.launch import ROOT, mpirun_command

EXTRAS = "mpi,cli,compile"
COMPILE = """
from cometrt.kernels.compiler import compile_cubin, kernels_folder
import cometrt, platform, sys
found = sorted(str(path.relative_to(kernels_folder())) for path in kernels_folder().rglob("*.cu*"))
assert found == sys.argv[1].split(","), found
compile_cubin(kernels_folder() / "protocol" / "publish.cu")
print(cometrt.__version__, platform.python_version(), cometrt.__file__)
"""
OFFLINE = ("--no-deps", "--no-index", "--disable-pip-version-check", "-q")


def start(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, env=env | variables, text=True, timeout=900,
        capture_output=True,
    )  # fmt: skip


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    result = start(*command, cwd=cwd, **variables)
    if result.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}")
    return result.stdout


def code_of(page: str) -> str:
    """The page's blocks that need no JAX."""
    blocks = (block.text for block in blocks_of(page) if block.language == "python")
    return "\n".join(text for text in blocks if "jax" not in text)


def check_promises(
    python: str | Path, mpirun: list[str], folder: Path, device: str, **variables: str
) -> str:
    """Run what the documents promise, with the installation that this Python finds, and return what
    to say of it. `folder` is where the package must be; the commands run in one below it."""
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir(parents=True)
    kernels = sorted(
        str(path.relative_to(ROOT / "kernels_cu")) for path in (ROOT / "kernels_cu").rglob("*.cu*")
    )
    cold = variables | {"COMETRT_CACHE_DIR": str(folder / "cache")}
    said = run(python, "-c", COMPILE, ",".join(kernels), cwd=elsewhere, **cold)
    version, python_version, where = said.split()
    assert Path(where).is_relative_to(folder), where
    two_ranks = [*mpirun, python, "-m", "mpi4py"]
    (elsewhere / "readme.py").write_text(code_of("README.md"))
    run(python, "readme.py", cwd=elsewhere, **variables)
    run(*two_ranks, "readme.py", cwd=elsewhere, **variables)
    demo = ("demo", "--scale", "16", "--ranks", "2", "--device", device)
    assert "agrees" in run(python, "-m", "cometrt", *demo, cwd=elsewhere, **variables)
    if device == "cuda":
        (elsewhere / "start.py").write_text(code_of("docs/start.md"))
        run(*two_ranks, "start.py", cwd=elsewhere, **variables)
        for name in ("moe_layer.py", "common.py"):
            shutil.copy(ROOT / "examples" / name, elsewhere)
        options = ("--scale", "32", "--tokens", "96", "--device", device)
        checked = run(*two_ranks, "moe_layer.py", *options, cwd=elsewhere, **variables)
        assert "checked: y " in checked, checked
    check_doctor(python, elsewhere, variables)
    return f"cometrt {version} works with Python {python_version} on {device}"


def check_doctor(python: str | Path, folder: Path, variables: dict[str, str]) -> None:
    result = start(python, "-m", "cometrt", "doctor", "--json", cwd=folder, **variables)
    if not result.stdout:
        sys.exit(f"doctor: {result.stderr}")
    lines = json.loads(result.stdout)["checks"]
    failed = [line for line in lines if line["state"] == "failed"]
    if failed or result.returncode:
        sys.exit(
            "\n".join(f"{line['check']}: {line['text']} ({line['advice']})" for line in failed)
        )


# ---- in an environment of its own ----------------------------------------------------------------


def try_out(distribution: Path, python: str, folder: Path) -> None:
    """Install it into a new environment, and run what the README promises."""
    place = folder / distribution.suffix.lstrip(".")
    place.mkdir()
    run(python, "-m", "venv", place / "venv", cwd=place)
    bin_folder = place / "venv" / "bin"
    inside = bin_folder / "python"
    run(inside, "-m", "pip", "install", "-q", f"{distribution}[{EXTRAS}]", cwd=place)
    mpirun = [str(bin_folder / "mpirun"), "-n", "2"]
    cache = {"COMETRT_CACHE_DIR": str(place / "cache")}
    said = check_promises(inside, mpirun, place, "host", **cache)
    run(bin_folder / "cometrt", "--version", cwd=place)
    print(f"{distribution.name}: {said}", flush=True)


# ---- beside what this Python has -----------------------------------------------------------------


def try_in_place(distribution: Path, folder: Path, device: str) -> None:
    """Install it into a folder, which comes first on this Python's path, and run what the documents
    promise. Nothing is fetched."""
    place = folder / distribution.suffix.lstrip(".")
    target = place / "packages"
    target.mkdir(parents=True)
    how = ["--no-build-isolation"] if distribution.suffix == ".gz" else []
    pip = (sys.executable, "-m", "pip", "install", *OFFLINE, *how, "--target")
    given = {name: value for name, value in os.environ.items() if name.startswith("PYTHON")}
    given |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    run(*pip, target, distribution, cwd=place, **given)
    given |= {"PYTHONPATH": python_path(target)}
    mpirun = mpirun_command(2)
    if not mpirun:
        sys.exit("there is no mpirun")
    said = check_promises(sys.executable, mpirun, place, device, **given)
    run(target / "bin" / "cometrt", "--version", cwd=place, **given)
    print(f"{distribution.name}: {said}, installed by pip install --target", flush=True)


def python_path(first: Path) -> str:
    """A folder, and those of PYTHONPATH that are not of this checkout."""
    others = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    kept = [path for path in others if not Path(path).resolve().is_relative_to(ROOT)]
    return os.pathsep.join([str(first), *kept])


def compare(sdist: Path, wheel: Path) -> int:
    """Compare the package that an sdist has with the wheel's. Returns the number of files."""
    ours, others = package_of_sdist(sdist), package_of_wheel(wheel)
    differ = sorted(
        name for name in ours.keys() | others.keys() if ours.get(name) != others.get(name)
    )
    if differ:
        sys.exit(f"{sdist.name} and {wheel.name} differ in {', '.join(differ)}")
    return len(ours)


def package_of_wheel(wheel: Path) -> dict[str, bytes]:
    """The files of the package, by their path there."""
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.startswith("cometrt/") and n[-1] != "/"]
        return {name.removeprefix("cometrt/"): archive.read(name) for name in names}


def package_of_sdist(sdist: Path) -> dict[str, bytes]:
    """The files that a wheel of it would have in the package."""
    found = {}
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            _, _, path = member.name.partition("/")  # below cometrt-VERSION
            file = archive.extractfile(member)
            if file is not None and path.startswith(("cometrt/", "kernels_cu/")):
                found[path.removeprefix("cometrt/")] = file.read()
    return found


def has_backend() -> bool:
    return importlib.util.find_spec("hatchling") is not None


def try_on_gpu(wheel: Path | None, sdist: Path | None, folder: Path) -> None:
    if wheel is None:
        if not (has_backend() and importlib.util.find_spec("build")):
            sys.exit(
                "give --wheel, and --sdist: this Python has no hatchling and build to make them"
            )
        build = (sys.executable, "-m", "build", "--no-isolation", "-o")
        run(*build, folder / "dist", ROOT, cwd=folder)
        (wheel,) = (folder / "dist").glob("*.whl")
        (sdist,) = (folder / "dist").glob("*.tar.gz")
    try_in_place(wheel.resolve(), folder, "cuda")
    if sdist is None:
        print("no --sdist: it was not tried")
    elif has_backend():
        try_in_place(sdist.resolve(), folder, "cuda")
    else:
        count = compare(sdist, wheel)
        print(
            f"{sdist.name}: not installed, since this Python has no hatchling; the {count} files "
            "of its package are those of the wheel"
        )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", default=sys.executable, help="of the environments")
    parser.add_argument("--gpu", action="store_true", help="beside what this Python has, on a GPU")
    parser.add_argument("--wheel", type=Path, help="with --gpu; default: it is built")
    parser.add_argument("--sdist", type=Path, help="with --gpu and --wheel")
    args = parser.parse_args(argv)
    if not args.gpu and (args.wheel or args.sdist):
        parser.error("--wheel and --sdist are for --gpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        if args.gpu:
            try_on_gpu(args.wheel, args.sdist, folder)
            return
        run(sys.executable, "-m", "build", "-o", folder / "dist", ROOT, cwd=folder)
        for distribution in sorted((folder / "dist").iterdir()):
            if distribution.suffix == ".whl":
                assert "kernels_cu/README.md" in package_of_wheel(distribution)
            try_out(distribution, args.python, folder)


if __name__ == "__main__":
    main()
