"""The server beside the bare loop and under load, at small sizes."""

import json

import pytest

from benchmarks.serving.command import ServingConfig, serving


def test_the_figures(capsys, tmp_path):
    output = tmp_path / "serving.json"
    serving(ServingConfig(streams=4, tokens=24, prompt=20, block=4, output=output))
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(output.read_text())
    assert (report["different"], report["compared"]) == ([], 3)
    assert report["server_tokens_per_second"] > 0 < report["of_bare"]
    assert report["with_arrivals_tokens_per_second"] > 0
    assert report["engine_seconds"]["turns"] > 10
    assert all(seconds > 0 for seconds in report["engine_seconds"].values())
    for when in ("all_at_once", "while_others_run"):
        assert 0 < report["first_token_ms"][when]["p50"] <= report["first_token_ms"][when]["p99"]


@pytest.mark.slow
def test_load_by_the_openai_package(capsys):
    serving(ServingConfig(streams=64, tokens=24, prompt=40, block=4, seconds=6))
    report = json.loads(capsys.readouterr().out)
    assert report["different"] == []  # every text as when it was alone
    assert report["slots_lost"] == 0
    assert min(report[kind] for kind in ("whole", "streamed", "left")) > 0
    first, last = report["arrays_mb"]
    assert last < 1.1 * first + 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "none"}, "model: expected one of smoke"),
        ({"streams": 0}, "streams: expected an int >= 1, got 0"),
        ({"seconds": 0.0}, "seconds: expected a number > 0 or None, got 0"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        ServingConfig(**options)
