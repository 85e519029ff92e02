"""The tables of speed in the documents are those of the benchmarks' JSON."""

import json

import pytest

from benchmarks import speed_table
from benchmarks.costs import PEAKS, STAGES


@pytest.mark.parametrize("command", list(speed_table.DOCUMENTS))
def test_the_documents_have_the_tables_of_the_results(command):
    text = speed_table.DOCUMENTS[command].read_text()
    table = speed_table.table(command, speed_table.read(command))
    assert speed_table.with_table(text, command, table) == text


def test_a_row_is_what_the_report_says():
    (report,) = speed_table.read("kernels")
    first, both = report["results"][:2]
    row = speed_table.table("kernels", [report]).splitlines()[2]
    assert f"{first['median'] * 1e3:.3f}" in row
    assert f"{both['median'] / both['floor']:.2f}" in row
    assert report["device"] in row
    assert report["commit"] in row


def test_stages_are_the_benchmarks_own():
    for report in speed_table.read("stages"):
        assert tuple(report["results"]) == STAGES
        for stage in report["results"].values():
            peak = PEAKS[report["device"]]
            floor = max(stage["flops"] / peak.flops, stage["bytes"] / peak.bandwidth)
            assert stage["floor"] == pytest.approx(floor)


def test_a_report_is_stamped_with_its_commit_or_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(speed_table, "RESULTS", tmp_path)
    path = tmp_path / "kernels-a.json"
    path.write_text(json.dumps({"device": "x", "results": []}))
    with pytest.raises(SystemExit, match=r"^commit: expected that of kernels-a\.json, got none"):
        speed_table.read("kernels")
    assert speed_table.read("kernels", "abc")[0]["commit"] == "abc"
    assert json.loads(path.read_text())["commit"] == "abc"


def test_a_document_without_a_place_for_the_table_is_refused():
    with pytest.raises(SystemExit, match="expected <!-- table: kernels --> and"):
        speed_table.with_table("text", "kernels", "| a |")
