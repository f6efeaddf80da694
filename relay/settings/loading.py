"""Sources: where the value of each option comes from.

Rules:
1. Later wins: default, file, environment, `--set`.
2. Nothing is ignored. A name that is no option, a value of the wrong type or out of bounds is a problem in
   whatever source it stands, overridden or not.
3. All problems are reported at once, each on a line of its own, and none shows a secret.
4. No file is searched for; what is not named is not read.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from relay.config import Config
from relay.errors import ConfigError
from relay.protocol.fingerprint import redact
from relay.settings.checks import Finding, find_problems, find_warnings
from relay.settings.notation import read_value
from relay.settings.options import Option, options, sections

PREFIX = "LUCENT_RELAY_"
"""Begins the name of every environment variable that is an option."""

SEPARATOR = "__"
"""Between section and option in a variable's name.

Variables without it are not ours to judge, as container platforms make some of a service's name (`LUCENT_RELAY_PORT`),
unless they are an option's but for one underscore.
"""

POSITION = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")
"""Where tomllib found a mistake, as it ends its message."""


class Loaded(msgspec.Struct, frozen=True):
    """A checked configuration."""

    config: Config
    """Every option's effective value."""
    origins: dict[str, str]
    """Where each came from, by dotted name: `default`, `file …`, `environment …` or `--set`."""

    def warnings(self) -> list[str]:
        """Return a line for everything that is allowed and seldom meant."""
        return [_line(finding, self.config, self.origins) for finding in find_warnings(self.config)]


def load(path: Path | None, environ: Mapping[str, str], sets: Sequence[str]) -> Loaded:
    """Return the configuration that the sources make together.

    Args:
        path: The TOML file; None for no file.
        environ: The process's environment.
        sets: Arguments of `--set`, each `section.option=value`, in order.

    Raises:
        ConfigError: Something in the sources cannot be used; it holds one line for each problem.
    """
    collector = _Collector()
    if path is not None:
        collector.read_file(path)
    collector.read_environment(environ)
    collector.read_sets(sets)
    return collector.finish()


class _Collector:
    """Gathers values and problems, source after source."""

    def __init__(self) -> None:
        self._options = options()
        self._values: dict[str, Any] = {name: option.default for name, option in self._options.items()}
        self._origins = dict.fromkeys(self._options, "default")
        self._problems: list[str] = []
        self._faulty: set[str] = set()

    def read_file(self, path: Path) -> None:
        """Take the values of a TOML file."""
        try:
            # Windows editors put a byte order mark before the text; it means nothing.
            document = tomllib.loads(path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n"))
        except OSError as problem:
            self._problems.append(f"{path}: cannot be read: {problem.strerror}")
            return
        except UnicodeDecodeError as problem:
            line = problem.object[: problem.start].count(b"\n") + 1
            self._problems.append(f"{path}, line {line}: is not UTF-8 text")
            return
        except ValueError as problem:
            self._problems.append(syntax_problem(path, str(problem)))
            return
        origin = f"file {path}"
        for section, table in document.items():
            if not isinstance(table, dict):
                hint = self._suggest(section)
                self._problems.append(f"{section} ({origin}): must stand in a section{hint}")
            elif section not in sections():
                hint = _did_you_mean(section, sections(), "[{}]")
                self._problems.append(f"[{section}] ({origin}): unknown section{hint}")
            else:
                for name, value in table.items():
                    self._take(f"{section}.{name}", value, origin)

    def read_environment(self, environ: Mapping[str, str]) -> None:
        """Take the values of the variables that begin with our prefix."""
        variables = {variable_name(option): name for name, option in self._options.items()}
        misspelt = {variable.replace(SEPARATOR, "_") for variable in variables}
        for variable, text in sorted(environ.items()):
            if variable in variables:
                self._take_text(variables[variable], text, f"environment {variable}")
            elif variable.startswith(PREFIX) and (SEPARATOR in variable.removeprefix(PREFIX) or variable in misspelt):
                hint = _did_you_mean(variable, variables, "{}")
                self._problems.append(f"{variable} (environment): unknown option{hint}")

    def read_sets(self, sets: Sequence[str]) -> None:
        """Take the values of `--set` arguments."""
        for number, argument in enumerate(sets, 1):
            name, equals, text = argument.partition("=")
            if equals:
                self._take_text(name.strip(), text.strip(), "--set")
            else:
                # What stands there in place of an option is not shown: it may be a secret.
                which = name if name in self._options else f"number {number}"
                self._problems.append(f"--set {which}: must be section.option=value")

    def finish(self) -> Loaded:
        """Check the options against one another, and return them.

        Raises:
            ConfigError: There were problems.
        """
        tree: dict[str, dict[str, Any]] = {section: {} for section in sections()}
        for name, value in self._values.items():
            option = self._options[name]
            tree[option.section][option.name] = value
        config = msgspec.convert(tree, Config)
        for finding in find_problems(config):
            # In place of a refused value stands an earlier one, and what follows from that is nobody's mistake.
            if not self._faulty & {finding.option, finding.other}:
                self._problems.append(_line(finding, config, self._origins))
        if self._problems:
            raise ConfigError([_printable(redact(problem)) for problem in self._problems])
        return Loaded(config, self._origins)

    def _take_text(self, name: str, text: str, origin: str) -> None:
        """Take a value written without TOML's demand for quotes."""
        option = self._options.get(name)
        if option is not None and option.is_text and not text.startswith(('"', "'")):
            self._take(name, text, origin)
            return
        try:
            value = read_value(text)
        except ValueError:
            value = text
            if option is not None and option.is_text:
                self._refuse(option, value, origin, "begins with a quote and must end with it")
                return
        self._take(name, value, origin)

    def _take(self, name: str, value: Any, origin: str) -> None:
        option = self._options.get(name)
        if option is None:
            # Its value is not shown: it may be a secret under a misspelt name.
            self._problems.append(f"{name} ({origin}): unknown option{self._suggest(name)}")
            return
        problem = option.problem(value)
        if problem is not None:
            self._refuse(option, value, origin, problem)
            return
        self._values[name] = value
        self._origins[name] = origin

    def _refuse(self, option: Option, value: Any, origin: str, problem: str) -> None:
        self._faulty.add(option.dotted)
        self._problems.append(f"{option.dotted} = {option.show(value)} ({origin}): {problem}")

    def _suggest(self, name: str) -> str:
        """Return `; did you mean …?` for a name that is no option, or nothing."""
        last = name.rpartition(".")[2]
        for dotted, option in self._options.items():
            if option.name == last:
                return f"; did you mean {dotted}?"
        return _did_you_mean(name, self._options, "{}")


def variable_name(option: Option) -> str:
    """Return the environment variable of an option."""
    return f"{PREFIX}{option.section}{SEPARATOR}{option.name}".upper()


def syntax_problem(path: Path, message: str) -> str:
    """Return tomllib's message with the place in front, as compilers write it."""
    place = POSITION.search(message)
    if place is None:
        return f"{path}: {message}"
    where = f"line {place[1]}, column {place[2]}" if place[1] else "at the end"
    return f"{path}, {where}: {message[: place.start()]}"


def _line(finding: Finding, config: Config, origins: Mapping[str, str]) -> str:
    """Return a finding as a line, with the values it is about and where they came from."""
    known = options()

    def stated(name: str) -> str:
        option = known[name]
        value = getattr(getattr(config, option.section), option.name)
        return f"{name} = {option.show(value)} ({origins[name]})"

    line = f"{stated(finding.option)}: {finding.text}"
    return f"{line} {stated(finding.other)}" if finding.other else line


def _did_you_mean(name: str, known: Iterable[str], form: str) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {form.format(close[0])}?" if close else ""


def _printable(line: str) -> str:
    """Return a line with its control characters and broken UTF-8 escaped, so that it stays one line."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in line
    )
