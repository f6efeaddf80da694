from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "relay"]


@pytest.mark.slow
@pytest.mark.parametrize("words", [["print-config"], ["check-config"]])
def test_reader_may_hang_up(words: list[str], tmp_path: Path) -> None:
    """A reader that has gone, as in `print-config | head`, is no failure and nothing to complain about."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = subprocess.run(
            [*COMMAND, *words], stdout=writer, stderr=subprocess.PIPE, cwd=tmp_path, timeout=60, check=False
        )
    finally:
        os.close(writer)
    assert (ended.returncode, ended.stderr) == (0, b"")


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--help"], ["--version"], ["check-config"]])
def test_quick_commands_load_little(words: list[str], tmp_path: Path) -> None:
    """What answers at once does not load the daemon's libraries."""
    program = (
        "import sys; from relay.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(sorted({'trio', 'apsw', 'hypercorn', 'h11', 'rich', 'structlog', 'orjson'} & set(sys.modules)))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, cwd=tmp_path, timeout=60, check=True
    )
    assert ended.stdout.splitlines()[-1] == b"[]"
