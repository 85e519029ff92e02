import os
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mdn_jax import compiled
from mdn_jax.cli.common import run
from mdn_jax.compiled import compiled_once
from tests.compile_cache import no_folder


@pytest.fixture(autouse=True)
def as_a_user_has_it(monkeypatch, tmp_path):
    """No directory of jax's, and everything takes long enough to be kept."""
    monkeypatch.setattr(compiled, "_SECONDS", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    with no_folder():
        yield


def place():
    return jax.config.jax_compilation_cache_dir


def compute():
    """A function of its own each time, which only the directory knows."""
    result = jax.jit(lambda x: jnp.cos(x) @ x + 1.5)(jnp.ones((3, 3)))
    return float(result.sum())


def programs(directory):
    return {path: path.read_bytes() for path in Path(directory).glob("*-cache")}


def test_a_command_finds_what_the_one_before_has_compiled(tmp_path):
    seen = []

    def command():
        compute()
        seen.append(place())
        return 0

    assert run("name", command) == 0
    (directory,) = (tmp_path / "home" / "mdn-jax").glob("compiled-*")
    written = {path: path.stat().st_mtime_ns for path in programs(directory)}
    assert run("name", command) == 0
    assert seen == [str(directory)] * 2
    assert written
    assert written == {path: path.stat().st_mtime_ns for path in programs(directory)}
    assert place() is None


def test_what_jax_was_told_comes_first(tmp_path, monkeypatch):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    with compiled_once():
        assert place() == str(tmp_path / "own")
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        with compiled_once():
            assert place() is None
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    with compiled_once(tmp_path / "first"), compiled_once(tmp_path / "second"):
        assert place() == str(tmp_path / "first")


@pytest.mark.parametrize("end", [0, 100])
def test_an_entry_that_was_cut_off_costs_a_warning(tmp_path, end):
    with compiled_once(tmp_path):
        right = compute()
    for path, content in programs(tmp_path).items():
        path.write_bytes(content[:end])
    with compiled_once(tmp_path), pytest.warns(UserWarning, match="compilation cache"):
        assert compute() == right


def test_no_place_to_write(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with compiled_once(tmp_path / "file" / "directory"):
        assert place() is None
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # a superuser may always write
    with compiled_once(tmp_path / "read-only"):
        assert place() is None
