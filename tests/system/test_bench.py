"""The benchmarks run, and report what they say they do; how fast anything is, no test says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]


@pytest.mark.slow
def test_intake_benchmark_reports(tmp_path: Path) -> None:
    """One short round of the intake benchmark gives figures of both servers, and nothing was refused."""
    words = ["--size", "medium", "--seconds", "1", "--rounds", "1", "--json", "--directory", str(tmp_path)]
    ended = subprocess.run(
        [sys.executable, "-m", "bench.intake", *words],
        cwd=CHECKOUT,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, b"")
    report = json.loads(ended.stdout)
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
