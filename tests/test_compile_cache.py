"""The folder of compiled programs that runs of the tests share."""

import os
import time
from pathlib import Path

import jax
import pytest

from tests.compile_cache import CompiledPrograms


@pytest.fixture
def told(monkeypatch):
    """What jax is told, which does not reach it."""
    options = {}
    monkeypatch.setattr(jax.config, "update", options.__setitem__)
    monkeypatch.setattr(os, "environ", {})
    return options


def own_folder(programs, told):
    programs.use()
    return Path(told["jax_compilation_cache_dir"])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_next_run_reads_what_this_one_compiled(tmp_path, told):
    first, beside = CompiledPrograms(tmp_path / "kept"), CompiledPrograms(tmp_path / "kept")
    (own_folder(first, told) / "a-cache").write_bytes(b"program")
    assert names(own_folder(beside, told)) == []  # nothing of another that may not be whole
    first.keep()
    beside.keep()
    following = own_folder(second := CompiledPrograms(tmp_path / "kept"), told)
    assert (following / "a-cache").read_bytes() == b"program"
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(following)
    second.keep()
    assert names(tmp_path / "kept") == ["a-cache"]
    assert not following.exists()


def test_two_that_run_at_once_exchange_what_is_whole(tmp_path, told):
    one, other = CompiledPrograms(tmp_path / "kept"), CompiledPrograms(tmp_path / "kept")
    (own_folder(one, told) / "a-cache").write_bytes(b"of one")
    (own_folder(other, told) / "b-cache").write_bytes(b"of the other")
    (own_folder(other, told) / "c-cache").touch()  # not written yet
    for programs in (one, other, one):
        programs.exchange()
    assert names(own_folder(one, told)) == ["a-cache", "b-cache"]
    assert (own_folder(one, told) / "b-cache").read_bytes() == b"of the other"
    assert (own_folder(other, told) / "a-cache").read_bytes() == b"of one"
    one.keep()
    other.keep()


def test_what_was_cut_off_and_what_nobody_reads_goes(tmp_path, told):
    programs = CompiledPrograms(tmp_path)
    (own_folder(programs, told) / "empty-cache").touch()
    for name, days in (("old-cache", 15), ("new-cache", 13), ("part-cache.12", 15)):
        (tmp_path / name).write_bytes(b"program")
        os.utime(tmp_path / name, (time.time() - days * 86_400,) * 2)
    programs.keep()
    assert names(tmp_path) == ["new-cache"]


def test_a_tree_that_cannot_be_written_keeps_nothing(tmp_path, told):
    (tmp_path / "file").touch()
    programs = CompiledPrograms(tmp_path / "file" / "kept")
    (own_folder(programs, told) / "a-cache").write_bytes(b"program")
    programs.keep()
    assert names(tmp_path) == ["file"]
