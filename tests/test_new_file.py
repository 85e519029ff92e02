"""Files that are there complete or not at all."""

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from mdn_jax.new_file import check_place, new_file, write_text


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old π")
    with contextlib.suppress(KeyError), new_file(path) as temporary:
        temporary.write_text("ne")
        raise KeyError
    assert path.read_text(encoding="utf-8") == "old π"
    with new_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text(encoding="utf-8") == "old π"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, path = [], tmp_path / "a"
    fsync = os.fsync
    monkeypatch.setattr(
        os,
        "fsync",
        lambda file: (synced.append((os.fstat(file).st_ino, path.exists())), fsync(file)),
    )
    write_text(path, "x")
    assert synced == [(path.stat().st_ino, False), (tmp_path.stat().st_ino, True)]


def test_writers_at_once_do_not_mix(tmp_path):
    path, texts = tmp_path / "a", [letter * 50_000 for letter in "abcdefgh"]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda text: write_text(path, text), texts))
    assert path.read_text() in texts
    assert list(tmp_path.iterdir()) == [path]


def test_links_are_followed_and_devices_left_as_they_are(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    write_text(link, "x")
    assert link.is_symlink()
    assert target.read_text() == "x"
    write_text("/dev/null", "x")
    assert not os.path.isfile("/dev/null")


def test_errors_name_the_path_that_was_asked_for(tmp_path):
    with pytest.raises(OSError, match=r"No such file or directory: '.*/gone/a'$"):
        write_text(tmp_path / "gone" / "a", "x")
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        write_text(tmp_path, "x")


def test_a_place_is_tried_before_the_work(tmp_path):
    (tmp_path / "there").write_text("as it was")
    for name in ("there", "new"):
        check_place(tmp_path / name)
    check_place("/dev/null")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_text() == "as it was"
    for path, kind in (
        (tmp_path, IsADirectoryError),
        (tmp_path / "nowhere" / "x", FileNotFoundError),
        (tmp_path / "there" / "x", NotADirectoryError),
    ):
        with pytest.raises(kind) as raised:
            check_place(path)
        assert raised.value.filename == str(path)
