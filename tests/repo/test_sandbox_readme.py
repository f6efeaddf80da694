from __future__ import annotations

import argparse
import re
from importlib import resources

import pytest

from relay.sandbox.faults import FaultSettings
from relay.sandbox.report import DataReport, Injected, KeyReport, Report, Violations
from relay.sandbox.server import add_arguments

README = resources.files("relay.sandbox").joinpath("README.md").read_text("utf-8")


def first_cells(heading: str) -> list[str]:
    """Return what is set in code in the first column of the table below a heading."""
    section = re.split(r"^#+ ", README.partition(f"# {heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    return re.findall(r"^\| `([^`]+)` \|", section, flags=re.MULTILINE)


def test_every_option_is_in_the_table() -> None:
    """The options' table has each option of the command, with its metavar, in order."""
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    options = [f"{action.option_strings[0]} {action.metavar or ''}".strip() for action in parser._actions]
    assert first_cells("Options") == options


def test_every_default_is_the_one_named() -> None:
    """The options' table names the defaults that hold."""
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    for action in parser._actions:
        row = re.search(rf"^\| `{action.option_strings[0]}\b[^|]*\| ([^|]*)\|", README, flags=re.MULTILINE)
        assert row is not None
        named = row[1].strip().strip("`")
        if action.dest == "error_status":
            expected = ",".join(map(str, FaultSettings().error_status))
        else:
            expected = f"{action.default:g}" if isinstance(action.default, float) else str(action.default)
        is_unset = action.default is False or (action.default == [] and action.dest != "error_status")
        assert named == ("" if is_unset else expected)


def test_every_fault_is_in_the_table() -> None:
    """The settings' table has each field."""
    assert first_cells("Fault settings") == list(FaultSettings.__struct_fields__)


def test_every_count_is_in_the_table() -> None:
    """The report's table has each field in the order in which the report has them."""
    assert first_cells("Report") == list(Report.__struct_fields__)


@pytest.mark.parametrize("struct", [Violations, Injected, KeyReport, DataReport])
def test_counts_within_counts_are_named(struct: type[Violations | Injected | KeyReport | DataReport]) -> None:
    """The fields of nested counts are named in their row."""
    assert all(f"`{field}`" in README for field in struct.__struct_fields__)
