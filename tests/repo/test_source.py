"""What no linter holds against the source."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.repo.tables import CHECKOUT

FOLDERS = ("relay", "config", "bench", "tests", ".ci")
"""What we write, beside the files at the top."""

FORBIDDEN = {
    "a path of somebody's machine": "/wo" + r"rk/|\.\./sha" + "red|/ro" + "ot/",
    "a package registry": "py" + r"pi\.org|python" + "hosted",
    "work left for later": r"\b(?:TO" + "DO|FIX" + r"ME|XX" + r"X)\b",
}
"""What has no place in a file, as patterns. Written in pieces, because this file is searched too."""

CATCH_ALLS = {
    "relay/http/listener.py": "one request's failure is that request's 500",
    "relay/http/asgi.py": "the same on the edge and admin listeners",
    "relay/forward/lane.py": "one attempt's failure is that attempt's own",
    "relay/data_api/flights.py": "and one request's to the data API",
    "relay/spool/transactions.py": "what a step raises on the spool's thread is handed to whoever waits for it",
    "relay/cli.py": "the process's edge, where a mistake becomes an exit status",
}
"""The files where everything may be caught, once each, and why there."""


def files(suffix: str = "") -> Iterator[Path]:
    """Yield the files that are ours to write."""
    # In a linked worktree `.git` is a file, and says where the repository is.
    top = (path for path in CHECKOUT.iterdir() if path.is_file() and path.name != ".git")
    below = (path for folder in FOLDERS for path in (CHECKOUT / folder).rglob("*"))
    for path in (*top, *below):
        if path.is_file() and path.suffix.endswith(suffix) and not path.parts.count("__pycache__"):
            yield path


def trees(folder: str) -> Iterator[tuple[str, ast.Module]]:
    """Yield the modules below a folder, parsed, by path."""
    for path in sorted((CHECKOUT / folder).rglob("*.py")):
        yield path.relative_to(CHECKOUT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_holds(what: str) -> None:
    """No file names this machine, a registry, or work left for later."""
    pattern = re.compile(FORBIDDEN[what])
    found = []
    for path in files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # recordings
        found += [
            f"{path.relative_to(CHECKOUT)}:{number}: {line.strip()[:100]}"
            for number, line in enumerate(text.splitlines(), 1)
            if pattern.search(line)
        ]
    assert found == []


def test_everything_is_caught_in_few_places() -> None:
    """`except Exception` stands once in each of the files that contain a failure, and nowhere else."""
    found: Counter[str] = Counter()
    for path, tree in trees("relay"):
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler) and (
                node.type is None or ast.unparse(node.type) in ("Exception", "(Exception,)")
            ):
                found[path] += 1
    assert found == dict.fromkeys(CATCH_ALLS, 1)


def test_shields_have_deadlines() -> None:
    """A scope that cancellation cannot enter ends by itself: `shield=True` stands beside a deadline."""
    found = []
    for path, tree in trees("relay"):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                named = {keyword.arg for keyword in node.keywords}
                timed = ast.unparse(node.func).endswith(("_after", "_at")) or "deadline" in named
                bad = "shield" in named and not timed
            else:
                targets = node.targets if isinstance(node, ast.Assign) else []
                bad = any(isinstance(target, ast.Attribute) and target.attr == "shield" for target in targets)
            if bad:
                found.append(f"{path}:{getattr(node, 'lineno', 0)}")
    assert found == []


def test_every_test_states_its_property() -> None:
    """Each test has a docstring of one sentence."""
    found = []
    for path, tree in trees("tests"):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                text = ast.get_docstring(node) or ""
                if not text.partition("\n\n")[0].endswith("."):
                    found.append(f"{path}:{node.lineno} {node.name}")
    assert found == []


def test_every_module_says_what_it_owns() -> None:
    """Each module of the relay has a docstring, and none has grown past reading in one sitting."""
    for path, tree in trees("relay"):
        assert ast.get_docstring(tree), path
        assert len((CHECKOUT / path).read_text(encoding="utf-8").splitlines()) <= 500, path
