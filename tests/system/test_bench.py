"""The benchmarks run, and report what they say they do; how fast anything is, no test says.

The crowd is more than that: it is the whole relay at life's pace on a key that is too small, for as long as a test may
take. `python -m bench.crowd` does the same for ten minutes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.accounting import assert_accounted

CHECKOUT = Path(__file__).parents[2]


def run_bench(module: str, *words: str, seconds: float) -> dict[str, Any]:
    """Return the report of a benchmark that ends by 0 within its time, and has nothing to complain of."""
    ended = subprocess.run(
        [sys.executable, "-m", module, *words, "--json"],
        cwd=CHECKOUT,
        capture_output=True,
        timeout=seconds,
        check=False,
    )
    assert (ended.returncode, ended.stderr.decode()) == (0, "")
    report: dict[str, Any] = json.loads(ended.stdout)
    return report


@pytest.mark.slow
def test_intake_benchmark_reports(tmp_path: Path) -> None:
    """One short round of the intake benchmark gives figures of both servers, and nothing was refused."""
    words = ["--size", "medium", "--seconds", "1", "--rounds", "1", "--directory", str(tmp_path)]
    report = run_bench("bench.intake", *words, seconds=120)
    assert list(report["sizes"]) == ["medium"]
    size = report["sizes"]["medium"]
    assert 20_000 < size["json_bytes"] < 35_000
    for [found] in (size["noop"], size["relay"]):
        assert found["refused"] == 0
        assert found["requests_per_second"] > 0
        assert 0 < found["p50_ms"] <= found["p99_ms"]
    assert size["ratios"] == [size["relay"][0]["requests_per_second"] / size["noop"][0]["requests_per_second"]]
    assert size["spool_megabytes"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_crowd_on_one_key(tmp_path: Path) -> None:
    """A hundred recorded sessions on one key: nothing is lost, no 429 is caused, and no request is wasted."""
    words = ["--sessions", "100", "--seconds", "75", "--directory", str(tmp_path)]
    report = run_bench("bench.crowd", *words, seconds=240)
    assert report["problems"] == []
    result, account = report["result"], report["account"]
    assert result["exactly_once"]
    assert (result["events_lost"], result["events_duplicated"], result["events_misordered"]) == (0, 0, 0)
    assert result["rate_limited"] == 0
    # The key is too small for all of this, and what it carried was carried well.
    assert report["fewest_of_all"] > report["seconds"] / 60 * report["requests_per_minute"]
    assert report["saturated_requests"] > 0
    assert report["saturated_ratio"] <= 1.05
    assert account["spooled"] > 0
    assert_accounted(account, accepted=result["events_accepted"], delivered=result["events_delivered"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_huge_spool_costs_neither_memory_nor_reading(tmp_path: Path) -> None:
    """A backlog is opened by reading a part of it, held and drained in bounded memory; meanwhile clients are served."""
    words = ["--segments", "20000", "--session-batches", "5", "--wait", "4", "--directory", str(tmp_path)]
    report = run_bench("bench.backlog", *words, seconds=300)
    assert (report["segments"], report["windows"]) == (20_000, 4_000)
    for phase in (report["down"], report["up"]):
        assert phase["client_failed"] == 0
        assert phase["open_resident_megabytes"] < 100
        assert phase["peak_resident_megabytes"] < 150
        assert phase["open_read_bytes"] - report["empty_open_read_bytes"] < report["spool_bytes"] / 4
    assert report["drain"]["requests"] >= 4_000
    assert list(tmp_path.iterdir()) == []


def test_data_api_benchmark_reports() -> None:
    """One short round gives figures of every way; a large answer passes in little memory, polls are shared."""
    words = ["--seconds", "0.5", "--rounds", "1", "--readers-seconds", "3"]
    report = run_bench("bench.data_api", *words, seconds=120)
    assert list(report["rounds"]) == ["direct", "passed on", "kept"]
    for [found] in report["rounds"].values():
        assert found["requests_per_second"] > 0
        assert 0 < found["p50_ms"] <= found["p99_ms"]
    # A tenth of the answer would be ten times the window.
    assert report["resident_peak_megabytes"] < report["resident_before_megabytes"] + 10
    assert report["polls_upstream"] <= 2 < report["polls"]
