"""Node.js as a witness: what upstream's own runtime makes of the bytes that we judge or produce."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

import pytest

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
    executable = shutil.which("node")
    if executable is None:
        if os.environ.get("CI"):
            pytest.fail("node is not on PATH, and CI has to show that we agree with it")
        pytest.skip("node is not on PATH, so agreement with it cannot be shown here")
    encoded = json.dumps([base64.b64encode(data).decode() for data in inputs]).encode()
    script = f"const judge = {judge};\n{_HARNESS}"
    finished = subprocess.run([executable, "-e", script], input=encoded, capture_output=True, check=True, timeout=120)
    outputs: list[Any] = json.loads(finished.stdout)
    return outputs
