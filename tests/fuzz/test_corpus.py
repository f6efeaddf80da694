from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"
INPUTS = [(name, file) for name in TARGETS for file in sorted((CORPUS / name).iterdir())]


@pytest.mark.parametrize(("name", "file"), INPUTS, ids=[f"{name}/{file.name}" for name, file in INPUTS])
def test_kept_inputs_hold(name: str, file: Path) -> None:
    """What fuzzing has found worth keeping, findings included, breaks no promise."""
    TARGETS[name](file.read_bytes())


def test_the_corpus_is_small_and_for_all() -> None:
    """Every target has inputs to begin with, and all of them together stay small."""
    assert {name for name, _ in INPUTS} == set(TARGETS)
    assert sum(file.stat().st_size for _, file in INPUTS) < 300_000
