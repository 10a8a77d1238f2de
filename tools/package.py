"""Build the wheel and the sdist, check what they hold, and test the wheel in clean environments.

``tools/package`` calls it. Tests come out of the sdist, without the package beside them; the package out of the wheel.
The environments, each made afresh:

``installed``
    the wheel over the packages of .venv
``pinned``
    the versions of tools/constraints.txt
``lowest``, ``newest``
    the lowest and the newest versions of direct dependencies that pyproject.toml allows, as uv resolves them

PyTorch has the version of tools/constraints.txt in all of them unless ``--torch`` says otherwise, since most releases
on package indexes bring gigabytes of CUDA libraries. With ``--borrow``, lowest and newest hold the package's own
dependencies only; PyTorch and the test tools are those of .venv. That takes seconds, not minutes.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PINS = ROOT / "tools" / "constraints.txt"
KINDS = ("installed", "pinned", "lowest", "newest")
SMOKE = ("smoke", "linalg")
CORE = (
    "smoke",
    "architecture",
    "store",
    "extract",
    "compress",
    "fisher",
    "influence",
    "top",
    "cli",
    "distributed",
    "remote",
)
TEST_TOOLS = ("pytest", "hypothesis", "moto[server]", "pandas", "xarray", "selenium")
UNREACHED = re.compile(r"failed to (fetch|connect)|error sending request|client error|dns error", re.I)


class NoIndexError(Exception):
    """No package index could be reached."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"environments: {', '.join(KINDS)} (installed)")
    parser.add_argument("--all", action="store_true", help="run the whole suite")
    parser.add_argument("--borrow", action="store_true", help="take PyTorch and the test tools from .venv")
    parser.add_argument("--tests", nargs="+", help="what pytest is to run, such as tests/test_store.py")
    parser.add_argument("--torch", default=pins()["torch"], help="PyTorch's version, or 'any'")
    parser.add_argument("--folder", type=Path, help="keep the files and the environments here")
    how = parser.parse_args()
    kinds = how.kinds or ["installed"]
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"expected environments of {', '.join(KINDS)}; received {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (how.folder or Path(temporary)).resolve()
        wheel, tests = build(folder)
        outcomes = {kind: outcome(kind, how, folder, wheel, tests) for kind in kinds}
    for kind, said in outcomes.items():
        print(f"{kind}: {said}")
    return int("failed" in outcomes.values())


def outcome(kind: str, how: argparse.Namespace, folder: Path, wheel: Path, tests: Path) -> str:
    """Make an environment and run the tests in it; return how that ended."""
    begun = time.monotonic()
    place = folder / kind
    shutil.rmtree(place, ignore_errors=True)
    try:
        python = environment(kind, how, place, wheel)
    except NoIndexError:
        return "not tested, no package index was reached"
    print(f"{kind}: {listed(python)} (made in {time.monotonic() - begun:.0f} s)", flush=True)
    if how.tests:
        chosen = how.tests
    else:
        light = how.borrow or kind == "installed"
        chosen = [] if how.all else [f"tests/test_{name}.py" for name in (SMOKE if light else CORE)]
    done = subprocess.run([python, "-I", "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen], cwd=tests)
    return "passed" if done.returncode == 0 else "failed"


def build(folder: Path) -> tuple[Path, Path]:
    """Build both files and check them; return the wheel and the folder of the tests."""
    shutil.rmtree(folder / "dist", ignore_errors=True)
    quiet([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", ROOT])
    (wheel,), (sdist,) = (list((folder / "dist").glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
        compare("sdist", held, tracked() - UNPACKED | {"PKG-INFO"})
        shutil.rmtree(folder / "source", ignore_errors=True)
        archive.extractall(folder / "source", filter="data")
    compare("wheel", {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name},
            {name for name in tracked() if name.startswith("ooc_influence/")})  # fmt: skip
    (source,) = (folder / "source").iterdir()
    shutil.rmtree(source / "ooc_influence")  # what is tested is the wheel
    print(f"built {wheel.name} ({wheel.stat().st_size >> 10} KiB) and {sdist.name} ({sdist.stat().st_size >> 10} KiB)")
    return wheel, source


UNPACKED = {".gitignore", ".pre-commit-config.yaml", ".ci/run"}  # what only a checkout needs; hatchling adds .gitignore


def tracked() -> set[str]:
    """Return the files that git knows, those not yet committed among them."""
    command = ["git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard"]
    names = quiet(command).splitlines()
    return {name for name in names if (ROOT / name).exists()}


def compare(what: str, held: set[str], expected: set[str]) -> None:
    missing, more = sorted(expected - held), sorted(held - expected - UNPACKED)
    if missing or more:
        sys.exit(f"expected the {what} to hold what git tracks; received it without {missing}, and with {more} beside")


def environment(kind: str, how: argparse.Namespace, place: Path, wheel: Path) -> Path:
    """Make a virtual environment of a kind with the wheel in it; return its Python."""
    venv.create(place, with_pip=False)
    python = place / "bin" / "python"
    if kind == "installed" or how.borrow:
        (own,) = place.glob("lib/python*/site-packages")
        (lent,) = (ROOT / ".venv").resolve().glob("lib/python*/site-packages")
        (own / "borrowed.pth").write_text(f"{lent}\n")  # its .pth files, the editable install's among them, stay unread
        pip(python, "--no-deps", "--force-reinstall", wheel)  # the editable one counts as installed
        if kind in ("lowest", "newest"):
            pip(python, "--no-deps", *resolve(kind, own_requirements(), place))
        return python
    known = resolve(kind, all_requirements(how.torch), place) if kind != "pinned" else PINS.read_text().splitlines()
    (place / "versions.txt").write_text("\n".join(known))
    extras = ",".join(project()["optional-dependencies"])
    tools = [line for line in all_requirements(how.torch) if name_of(line) in map(name_of, TEST_TOOLS)]
    pip(python, "-c", place / "versions.txt", f"{wheel}[{extras}]", *tools)
    return python


def own_requirements() -> list[str]:
    """Return what the package needs, and the scheduler that goes with its Dask; no PyTorch."""
    own = [line for line in project()["dependencies"] if name_of(line) != "torch"]
    return own + project()["optional-dependencies"]["distributed"]


def all_requirements(torch: str) -> list[str]:
    """Return what the package and its extras need, PyTorch's version and the test tools' as they are pinned."""
    own = project()
    lines = own["dependencies"] + [line for extra in own["optional-dependencies"].values() for line in extra]
    tools = [f"{name}=={pins()[name_of(name)]}" for name in TEST_TOOLS if name_of(name) in pins()]
    return lines + tools + ([] if torch == "any" else [f"torch=={torch}"])


def resolve(kind: str, requirements: list[str], place: Path) -> list[str]:
    """Return name==version of a set of packages that go together, the direct ones lowest or newest.

    Raises
    ------
    NoIndexError
        If no package index answers.
    """
    source = place / "requirements.in"
    source.write_text("\n".join(requirements) + "\n")
    way = "lowest-direct" if kind == "lowest" else "highest"
    command = [Path(sys.executable).with_name("uv"), "pip", "compile", "--quiet", "--no-header", "--no-annotate"]
    command += ["--resolution", way, "--python", place / "bin" / "python", source]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and UNREACHED.search(done.stderr):
        raise NoIndexError
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout.splitlines()


def pip(python: Path, *what: object) -> None:
    """Install with .venv's pip, for an environment without its own."""
    quiet([sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check", *what])


def quiet(command: list[object]) -> str:
    """Run; print what it said only if it failed, and stop then."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def listed(python: Path) -> str:
    """Return the versions of the main dependencies, as the environment's own Python finds them."""
    names = [name_of(line) for line in project()["dependencies"]]
    script = "import sys, importlib.metadata as held; print(*(f'{name} {held.version(name)}' for name in sys.argv[1:]))"
    return quiet([python, "-I", "-c", script, "ooc_influence", *names]).strip()


def name_of(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def pins() -> dict[str, str]:
    pairs = (line.split("==") for line in PINS.read_text().splitlines() if "==" in line)
    return {name_of(name): version for name, version in pairs}


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


if __name__ == "__main__":
    sys.exit(main())
