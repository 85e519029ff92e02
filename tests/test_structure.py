"""The direction of imports: kernels <- library <- training; nothing imports tests or benchmarks."""

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
    "train": {"train", "configs", "mdn_jax"},
}
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
            assert top not in OURS or top in ALLOWED[package], f"{path} imports {module}"


def test_layers_never_import_kernels():
    for path in (ROOT / "mdn_jax" / "layers").rglob("*.py"):
        assert not any(m.startswith("pallas_kernels") for m in imports(path)), path


def test_importing_the_library_needs_no_gpu_package():
    code = (
        "import sys, mdn_jax; print({'triton', 'jax_triton', 'pallas_kernels'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()", out.stdout
