"""`python -m relay` is the `lucent-relay` command."""

from relay.cli import command

command()
