"""Results on disk: found again, cut short; compiled programs."""

import pytest

from benchmarks.records import Records


def test_what_was_written_is_found(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    with Records(path) as records:
        assert records.find({}) == []
        records.add({"name": "a", "shape": (1, 2), "path": tmp_path, "value": 0.1})
        records.add({"name": "a", "shape": (1, 3), "value": 0.2})
        assert [r["value"] for r in records.find({"name": "a"})] == [0.1, 0.2]
    with Records(path) as records:
        assert [r["value"] for r in records.find({"shape": (1, 2), "path": tmp_path})] == [0.1]
        assert records.find({"name": "b"}) == records.find({"other": None, "name": "b"}) == []
        records.add({"name": "b"})
    assert len(path.read_text().splitlines()) == 3


def test_a_line_cut_short_is_removed(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"value": 1}\n{"välue')
    with Records(path) as records:
        assert records.find({}) == [{"value": 1}]
        records.add({"value": 2})
    assert path.read_text() == '{"value": 1}\n{"value": 2}\n'


@pytest.mark.parametrize("end", ["", "\n"])
def test_something_else_is_not_touched(tmp_path, end):
    path = tmp_path / "results.jsonl"
    path.write_text(f"no results{end}")
    with pytest.raises(SystemExit, match=r"results\.jsonl: expected lines of JSON, got 'no resul"):
        Records(path)
    assert path.read_text() == f"no results{end}"
