"""The tree: directions of imports, no circles, no long files, no long functions."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "pallas_kernels": {"pallas_kernels"},
    "mdn_jax": {"mdn_jax", "pallas_kernels"},
    "configs": {"configs", "train", "mdn_jax"},
    "train": {"train", "mdn_jax"},
}
# the command line of training offers the configurations by name
READ_CONFIGS = {ROOT / "train" / "cli" / "configuration.py"}
OURS = {*ALLOWED, "tests", "benchmarks", "examples"}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield node.module


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_follow_the_direction(package):
    for path in (ROOT / package).rglob("*.py"):
        for module in imports(path):
            top = module.split(".")[0]
            allowed = ALLOWED[package] | ({"configs"} if path in READ_CONFIGS else set())
            assert top not in OURS or top in allowed, f"{path} imports {module}"


def modules():
    """Every module of ours but the tests, by its name, with its file."""
    for package in (*ALLOWED, "benchmarks", "examples"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def needs(path, known):
    """The modules of ours that one imports, wherever in it: `from a import b` may be module a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else node.module for name in inside]
        else:
            continue
        yield from (name for name in names if name in known)


def circle(graph):
    """Some modules of which each imports the next, and the last the first; [] if there are none."""
    done = set()

    def search(name, trail):
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return []
        found = next((c for x in graph[name] if (c := search(x, [*trail, name]))), [])
        done.add(name)
        return found

    return next((c for name in graph if (c := search(name, []))), [])


def test_a_circle_is_found():
    assert circle({"a": ["b"], "b": ["c"], "c": []}) == []
    assert circle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c", "b"]


def test_no_circle_of_imports():
    known = dict(modules())
    assert len(known) > 100
    assert circle({name: sorted(set(needs(path, known))) for name, path in known.items()}) == []


def bodies(path):
    """Every function of a file with the lines of its body, without its docstring."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            yield node.name, body[-1].end_lineno - body[0].lineno + 1 if body else 0


def test_no_long_file_and_no_long_function():
    files = [
        path for package in ("mdn_jax", "pallas_kernels") for path in (ROOT / package).rglob("*.py")
    ]
    long = {str(path): n for path in files if (n := len(path.read_text().splitlines())) > 400}
    assert long == {}
    long = {f"{path}:{name}": n for _, path in modules() for name, n in bodies(path) if n > 100}
    assert long == {}


def test_layers_never_import_kernels():
    for path in (ROOT / "mdn_jax" / "layers").rglob("*.py"):
        assert not any(m.startswith("pallas_kernels") for m in imports(path)), path


def test_importing_the_library_needs_no_gpu_package():
    code = (
        "import sys; from mdn_jax import *; "
        "print({'triton', 'jax_triton', 'pallas_kernels'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()", out.stdout


def test_the_names_of_the_library_are_imported_at_first_use():
    code = "\n".join(
        [
            "import sys, mdn_jax, mdn_jax.cli.commands",
            "assert 'jax' not in sys.modules",  # so that a command answers Ctrl-C from the start
            "assert set(mdn_jax.__all__) <= set(dir(mdn_jax))",
            "assert mdn_jax.models.MDNConfig is mdn_jax.MDNConfig",
            "assert not hasattr(mdn_jax, 'nothing')",
        ]
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_message_names_a_package_that_is_not_published():
    for house in ("mdn_jax", "pallas_kernels", "train", "configs", "benchmarks"):
        for path in (ROOT / house).rglob("*.py"):
            assert "mdn-jax[" not in path.read_text(), path
