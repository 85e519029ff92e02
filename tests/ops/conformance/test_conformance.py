"""The conformance suite over every implementation."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

from tests.ops.conformance.subjects import SUBJECTS

QUICK = {("scan", "float64"), ("decode", "float32"), ("decode_triton", "float32")}


def every_check():
    for subject, checks in SUBJECTS.items():
        for check in checks:
            marks = []
            if (subject, check.dtype) not in QUICK or check.name in ("any_length", "pieces"):
                marks.append(pytest.mark.slow)
            yield pytest.param(check, id=f"{subject}-{check}", marks=marks)


@pytest.fixture
def native_triton(request, monkeypatch):
    """jax-triton, which cannot be imported where there is no GPU, on Triton's interpreter."""
    if "decode_triton" in request.node.name:
        from tests.kernels.triton_interpreter import interpreted_triton_call

        jax_triton = ModuleType("jax_triton")
        jax_triton.__spec__ = ModuleSpec("jax_triton", None)
        jax_triton.triton_call = interpreted_triton_call
        monkeypatch.setitem(sys.modules, "jax_triton", jax_triton)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of nan that is given on purpose
@pytest.mark.parametrize("check", list(every_check()))
def test_conforms(check, native_triton):
    check()
