"""Kernels in Triton's language on NumPy arrays: a stand-in for `jax_triton.triton_call`."""

import threading
from functools import cache
from unittest import mock

import jax
import numpy as np
from triton import JITFunction
from triton.runtime.interpreter import InterpretedFunction


class HostArray:
    """What Triton's interpreter asks of a tensor, for memory that is on the host already."""

    def __init__(self, array):
        self.array = array
        self.dtype = array.dtype

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def new_empty(self, *_, **__):
        return HostArray(self.array)

    def set_(self, storage, *_):
        self.array = storage.array

    def storage_offset(self):
        return 0

    def cpu(self):
        return self

    def copy_(self, other):
        assert other.array is self.array

    def size(self):
        return self.array.shape

    def stride(self):
        return self.array.strides


interpreted = cache(InterpretedFunction)
ONE_AT_A_TIME = threading.Lock()  # it replaces Triton's functions and puts back what it found


def call_interpreted(function, *arguments, **keywords):
    return interpreted(function.fn)(*arguments, **keywords)


def interpreted_triton_call(
    *arrays, kernel, out_shape, grid, input_output_aliases, name, num_warps, num_stages, **constants
):
    """Runs `kernel` once for every program of `grid`, results that take no operand's memory nan."""

    def run(*operands):
        operands = [np.array(x) for x in operands]
        results = [np.full(x.shape, np.nan, x.dtype) for x in out_shape]
        for operand, result in input_output_aliases.items():
            results[result] = operands[operand]
        references = [HostArray(x) for x in (*operands, *results)]
        # functions that the kernel calls were compiled ones when they were imported
        with ONE_AT_A_TIME, mock.patch.object(JITFunction, "__call__", call_interpreted):
            interpreted(kernel.fn)[grid](*references, **constants)
        return results

    return jax.pure_callback(run, list(out_shape), *arrays)
