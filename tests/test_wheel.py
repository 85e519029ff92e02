"""The wheel beside somebody else's project: two packages, five commands, and nothing in the way."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
# the project has modules of the names that our application has, without __init__.py
PROJECT = {"train.py": "train", "configs/mine.py": "configs", "benchmarks/mine.py": "benchmarks"}

USES_THE_LIBRARY = """
import benchmarks.mine, configs.mine, train
owners = train.OWNER, configs.mine.OWNER, benchmarks.mine.OWNER
assert owners == ("train", "configs", "benchmarks")

import sys
import jax, jax.numpy as jnp
from flax import nnx
import mdn_jax
from mdn_jax.saved.model import save_model

assert mdn_jax.__file__.startswith(sys.argv[1]), mdn_jax.__file__
config = mdn_jax.MDNConfig(
    vocab_size=257, hidden_size=16, num_hidden_layers=1, num_heads=1, head_dim=8, expand_v=1.0,
    intermediate_size=16,
)
model = mdn_jax.MDNForCausalLM(config, implementation="scan", rngs=nnx.Rngs(0))
tokens = jnp.arange(20)[None]
loss_of = lambda model: jnp.mean(model(tokens)[0] ** 2)
loss, gradient = nnx.jit(nnx.value_and_grad(loss_of))(model)
assert all(bool(jnp.any(x != 0)) for x in jax.tree.leaves(gradient)) and loss > 0
save_model(__import__("pathlib").Path("saved"), config, nnx.to_pure_dict(nnx.state(model)))
loaded = mdn_jax.load("saved", implementation="scan")
assert nnx.jit(loss_of)(loaded) == nnx.jit(loss_of)(model)
print("the library works")
"""

# console scripts in one process: importing jax takes most of the time of a command
RUNS_THE_COMMANDS = """
import contextlib, io, runpy, sys
from pathlib import Path

def run(name, *arguments):
    sys.argv = [name, *arguments]
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            runpy.run_path(str(Path(sys.executable).with_name(name)), run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
    return status, out.getvalue(), error.getvalue()

import mdn_jax
NAMES = ("mdn-generate", "mdn-eval", "mdn-convert", "mdn-inspect", "mdn-serve")
for name in NAMES:
    assert run(name, "--version") == (0, f"{name} (mdn-jax) {mdn_jax.__version__}\\n", "")

sys.modules["tyro"] = None  # as without the extra
for name in NAMES:
    status, out, error = run(name, "--help")
    assert (status, out) == (1, ""), (status, out)
    assert error.startswith(f"{name}: error: expected the package tyro, got none: install"), error
    extra = "serve" if name == "mdn-serve" else "cli"
    assert f"the extra '{extra}'" in error and error.count("\\n") == 1, error
del sys.modules["tyro"]

for name in NAMES:
    status, out, error = run(name, "--help")
    assert status == 0 and f"usage: {name}" in out, (status, out, error)

def works(*arguments):
    status, out, error = run(*arguments)
    assert status == 0, error
    return out

scan = ("--implementation", "scan")
text = works("mdn-generate", "saved", "--prompt", "abc", "--max-new-tokens", "4", *scan)
assert text.startswith("abc"), text
works("mdn-convert", "export", "saved", "published")
works("mdn-convert", "import", "published", "back")
assert works("mdn-generate", "back", "--prompt", "abc", "--max-new-tokens", "4", *scan) == text
small = ("--files", "train.py", "--batch-size", "1", *scan)
assert "nats" in works("mdn-eval", "perplexity", "back", *small, "--window", "16")
few = ("--row", "8", "--tokens", "16", "--window", "4", "--output-dir", "seen")
works("mdn-inspect", "back", *small, *few)
assert sorted(x.name for x in Path("seen").iterdir())[-1] == "inspection.json"
from importlib.resources import files
assert "<title>mdn-serve" in files("mdn_jax.serving").joinpath("page.html").read_text()
print("the commands work")
"""

TYPED = """
import mdn_jax
import pallas_kernels.tiling

reveal_type(mdn_jax.__version__)
reveal_type(mdn_jax.load("run"))
reveal_type(pallas_kernels.tiling.unsupported)
mdn_jax.MDNConfig(hidden_size="wide")
"""
# what the library itself imports takes mypy minutes
MYPY = "".join(
    f"[mypy-{name}.*]\nfollow_imports = skip\nignore_missing_imports = True\n"
    for name in ("jax", "flax", "numpy", "jaxtyping", "optax", "orbax")
)


def ran(*command: object, **options: object) -> str:
    """The output of a command that has to work."""
    # with a checkout in it pip would find the project installed
    options.setdefault("env", {k: x for k, x in os.environ.items() if k != "PYTHONPATH"})
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of a copy of the tree, as setuptools leaves files where it builds."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("mdn_jax", "pallas_kernels", "train", "configs", "benchmarks", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "golden")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    folder = tmp_path_factory.mktemp("wheel")
    ran(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """An environment with the wheel, and with all packages of this one that are no checkouts."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False)
    (site,) = home.glob("lib/python*/site-packages")
    python = home / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    ran(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel)
    (version,) = (path.name for path in site.glob("mdn_jax-*.dist-info"))
    assert {path.name for path in site.iterdir()} == {"mdn_jax", "pallas_kernels", version}
    # a folder that a .pth file names has its own .pth files, those of checkouts, left alone
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Somebody's project, and how its code is run."""
    folder = tmp_path_factory.mktemp("project")
    for name, owner in PROJECT.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f'OWNER = "{owner}"\n' * 8)
    environment = {"PYTHONPATH": ".", "PATH": "/usr/bin:/bin", "HOME": str(folder)}
    # compiling is most of the time
    quick = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return {"cwd": folder, "env": environment | quick}


def test_beside_a_project_the_library_and_its_commands_work(python, project):
    out = ran(python, "-c", USES_THE_LIBRARY, python.parents[1], **project)
    assert out == "the library works\n"
    assert ran(python, "-c", RUNS_THE_COMMANDS, **project).endswith("the commands work\n")


def test_a_user_sees_types(python, project, tmp_path):
    (tmp_path / "script.py").write_text(TYPED)
    (tmp_path / "mypy.ini").write_text("[mypy]\n" + MYPY)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--python-executable", str(python), "script.py"],
        cwd=tmp_path,
        env=project["env"],
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    revealed = ("str", "mdn_jax.models.causal_lm.MDNForCausalLM", "def (")
    for line, kind in zip(lines, revealed, strict=False):
        assert f'Revealed type is "{kind}' in line, done.stdout + done.stderr
    assert '"MDNConfig" has incompatible type "str"; expected "int"' in lines[3], done.stdout
    assert len(lines) == 5, done.stdout
