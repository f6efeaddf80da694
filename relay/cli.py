"""The command `lucent-relay`: what the operator types, and the status it ends with.

Rules:
1. `--help`, `--version` and mistakes on the command line load nothing of the relay: each command imports what it
   needs when it runs.
2. Results go to standard output, problems to standard error, one a line.
3. Every end is one of `ExitCode`.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from relay import __version__
from relay.errors import ConfigError, SpoolError
from relay.exit_codes import ExitCode
from relay.protocol.fingerprint import redact

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from relay.settings.loading import Loaded


MAX_DEPTH = 10_000
"""How deep JSON may be nested. Python's 1 000 would refuse the snapshot of a page whose elements are nested 500 deep,
which browsers allow and Node reads; 10 000 levels of the decoder need 3 MB of a thread's 8 MB stack."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; None for the process's own.

    Returns:
        An `ExitCode`.

    Raises:
        SystemExit: argparse ended it: 0 after `--help` and `--version`, 2 for a mistake on the command line.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments = build_parser(words).parse_args(words)
        command: Callable[[argparse.Namespace], int] = arguments.command
        return command(arguments)
    except ConfigError as error:
        complain(*error.problems)
        return ExitCode.CONFIGURATION
    except SpoolError as error:
        complain(str(error))
        return ExitCode.SPOOL
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BaseExceptionGroup as group:
        # trio's nurseries wrap what ends them, Ctrl-C too.
        if group.split(KeyboardInterrupt)[1] is None:
            return ExitCode.INTERRUPTED
        complain(redact(traceback.format_exc().rstrip()))
        return ExitCode.INTERNAL
    except Exception:  # noqa: BLE001 - the process's edge: unhandled it would end as 1, which is a verdict
        complain(redact(traceback.format_exc().rstrip()))
        return ExitCode.INTERNAL


def command() -> NoReturn:
    """Be the process: run the command in it, and end it with the command's exit code."""
    sys.setrecursionlimit(MAX_DEPTH)
    sys.exit(main())


def build_parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser.

    Args:
        words: The command line. The options of `sandbox` and `demo` are declared by those parts themselves, and
            only the part that is named on it is loaded.
    """
    parser = argparse.ArgumentParser(
        prog="lucent-relay",
        description="A durable ingest relay for rrweb session replays.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    chosen = next((word for word in words if not word.startswith("-")), None)

    def declare(name: str, summary: str, command: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        declared = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        declared.set_defaults(command=command)
        return declared

    add_source_arguments(declare("run", "Run the relay until SIGTERM or Ctrl-C.", run))
    add_source_arguments(declare("check-config", "Say what is wrong with a configuration.", check_config))
    add_source_arguments(declare("print-config", "Print every option's value and where it came from.", print_config))
    status = declare("status", "Ask a running relay how it is.", show_status)
    add_source_arguments(status)
    status.add_argument("--json", action="store_true", help="print the relay's answer as it is")
    spool = declare("spool", "Look for damage in the spool, save what can be saved, handle dead letters.", run_spool)
    if chosen == "spool":
        from relay.ops.upkeep import add_arguments as add_spool_arguments

        add_spool_arguments(spool, add_source_arguments)
    keys = declare("keys", "Let a key that upstream refused be tried at once.", release_key)
    release = keys.add_subparsers(title="actions", metavar="ACTION", required=True).add_parser(
        "release", help="try it, and let its clients in", allow_abbrev=False
    )
    release.add_argument("key", help="the key's fingerprint, as log and status show it")
    add_source_arguments(release)
    sandbox = declare("sandbox", "Run a stand-in for Lucent's APIs.", run_sandbox)
    if chosen == "sandbox":
        from relay.sandbox.server import add_arguments as add_sandbox_arguments

        add_sandbox_arguments(sandbox)
    demo = declare("demo", "Send recorded sessions through a relay to a sandbox, and add up.", run_demo)
    if chosen == "demo":
        from relay.demo.command import add_arguments as add_demo_arguments

        add_demo_arguments(demo)
    return parser


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare where the configuration comes from; the environment needs no argument."""
    parser.add_argument("--config", metavar="FILE", type=Path, help="configuration in TOML (default: none)")
    parser.add_argument(
        "--set",
        dest="sets",
        metavar="SECTION.OPTION=VALUE",
        action="append",
        default=[],
        help="set one option, over file and environment; repeatable",
    )


def load_settings(arguments: argparse.Namespace) -> Loaded:
    """Return the configuration that the arguments and the environment make.

    Raises:
        ConfigError: It cannot be used.
    """
    from relay.settings.loading import load

    return load(arguments.config, os.environ, arguments.sets)


def run(arguments: argparse.Namespace) -> int:
    """Run the relay until it is stopped."""
    config = load_settings(arguments).config

    from relay.app import run_relay

    return run_relay(config)


def check_config(arguments: argparse.Namespace) -> int:
    """Say that the configuration can be used, and what in it is seldom meant."""
    loaded = load_settings(arguments)
    say("configuration is valid")
    for warning in loaded.warnings():
        say(f"warning: {warning}")
    return ExitCode.OK


def print_config(arguments: argparse.Namespace) -> int:
    """Print the effective configuration as TOML."""
    loaded = load_settings(arguments)

    from relay.settings.rendering import render_effective

    say(render_effective(loaded.config, loaded.origins).rstrip())
    return ExitCode.OK


def show_status(arguments: argparse.Namespace) -> int:
    """Print what a running relay says of itself; its readiness is the exit status."""
    config = load_settings(arguments).config

    from relay.ops.inquiry import Unreachable, ask, summarise

    answer = ask(config.listen.admin)
    if isinstance(answer, Unreachable):
        complain(answer.reason)
        return ExitCode.NEGATIVE
    say(answer.status.decode() if arguments.json else summarise(answer))
    return ExitCode.OK if answer.ready else ExitCode.NEGATIVE


def run_spool(arguments: argparse.Namespace) -> int:
    """Look at the spool, or mend it."""
    config = load_settings(arguments).config

    from relay.ops.letters import Failure
    from relay.ops.upkeep import run

    outcome = run(arguments, config)
    if isinstance(outcome, Failure):
        for line in outcome.lines:
            say(line)
        complain(outcome.reason)
        return ExitCode.NEGATIVE
    for line in outcome:
        say(line)
    return ExitCode.OK


def release_key(arguments: argparse.Namespace) -> int:
    """Ask a running relay to try a held key at once."""
    config = load_settings(arguments).config

    from relay.ops.inquiry import Unreachable, order

    outcome = order(config.listen.admin, "/keys/release", {"key": arguments.key})
    if isinstance(outcome, Unreachable):
        complain(outcome.reason)
        return ExitCode.NEGATIVE
    if outcome.status != 200:
        complain(str(outcome.value.get("error", outcome.status)))
        return ExitCode.NEGATIVE
    say(f"{arguments.key} is tried now")
    return ExitCode.OK


def run_sandbox(arguments: argparse.Namespace) -> int:
    """Run the stand-in upstream until it is stopped."""
    from relay.sandbox.server import run_sandbox

    return run_sandbox(arguments)


def run_demo(arguments: argparse.Namespace) -> int:
    """Run the demonstration to its verdict."""
    from relay.demo.command import run_demo

    return run_demo(arguments)


def say(text: str) -> None:
    """Write a result to standard output."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # The reader has what it wanted, as in `print-config | head`. Python would try once more at exit and
        # complain; from now on there is nothing to complain about.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(*lines: str) -> None:
    """Write problems to standard error."""
    for line in lines:
        print(line, file=sys.stderr)
