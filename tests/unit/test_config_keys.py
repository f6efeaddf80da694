from __future__ import annotations

from pathlib import Path

import pytest

from relay.errors import ConfigError
from relay.settings.loading import Loaded, load
from relay.settings.options import MASK, options
from relay.settings.rendering import render_effective

CLIENT, ONE, TWO = "luc_pk_client", "luc_pk_one", "luc_pk_two"
POOLS = f'{{{CLIENT} = ["{ONE}", "{TWO}"]}}'


def with_sets(*sets: str) -> Loaded:
    """Return the settings that `--set` arguments make."""
    return load(None, {}, sets)


def problems(*sets: str) -> list[str]:
    """Return what is wrong with `--set` arguments."""
    with pytest.raises(ConfigError) as caught:
        with_sets(*sets)
    return caught.value.problems


@pytest.mark.parametrize("source", ["section", "inline", "environment", "--set"])
def test_pool_can_be_written_everywhere(source: str, tmp_path: Path) -> None:
    """A mapping reads the same as a table of a file, inline, from the environment, and from the command line."""
    path = tmp_path / "relay.toml"
    path.write_text("" if source not in ("section", "inline") else f"[keys]\npools = {POOLS}\n")
    if source == "section":
        path.write_text(f'[keys.pools]\n{CLIENT} = [\n  "{ONE}",\n  "{TWO}",\n]\n')
    environ = {"LUCENT_RELAY_KEYS__POOLS": POOLS} if source == "environment" else {}
    loaded = load(path, environ, [f"keys.pools={POOLS}"] if source == "--set" else [])
    assert loaded.config.keys.pools == {CLIENT: (ONE, TWO)}


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("keys.accept=some", 'must be "any" or "listed"'),
        ("keys.listed=luc_pk_one", 'must be a list: ["…", "…"]'),
        ("keys.listed=[1]", "each member: must be text in quotes"),
        ('keys.listed=["two words"]', "must be visible ASCII without blanks, as it becomes a header"),
        (f'keys.listed=["{MASK}"]', "must be the key itself; print-config writes asterisks instead of it"),
        ('keys.pools=["luc_pk_one"]', 'must be a table: { name = ["…", "…"] }'),
        ('keys.pools={luc_pk_client = "luc_pk_one"}', 'each name: must be a list: ["…", "…"]'),
        ("keys.pools={luc_pk_client = [1]}", "each name: each member: must be text in quotes"),
        ("keys.pools={luc_pk_client = []}", "must have an upstream key for every client key"),
        ('keys.pools={luc_pk_client = ["luc_pk_one", "luc_pk_one"]}', "must not name a key twice in a pool"),
        ('keys.pools={"two words" = ["luc_pk_one"]}', "must be visible ASCII without blanks"),
        ("budget.requests_per_minute=automatic", 'must be integer >= 0 and <= 1_000_000 or "auto"'),
        ("budget.requests_per_minute=true", "must be an integer"),
        ("budget.requests_per_minute=-1", "must be >= 0"),
    ],
)
def test_what_is_wrong_is_named(argument: str, expected: str) -> None:
    """A value of another shape is refused by the option's name, and no message holds a key."""
    name = argument.partition("=")[0]
    (problem,) = problems(argument)
    assert problem.startswith(f"{name} = ")
    assert expected in problem
    assert "luc_pk" not in problem
    assert "two words" not in problem


def test_pools_must_fit_the_spool() -> None:
    """More upstream keys than the spool keeps are refused at the start, not batch by batch."""
    (problem,) = problems(f"keys.pools={POOLS}", "keys.max_keys=1")
    assert problem.endswith("must not have more upstream keys than keys.max_keys = 1 (--set)")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (['keys.listed=["luc_pk_one"]'], "has no effect, since others are taken too"),
        (["keys.accept=listed"], "refuses every client"),
        (['keys.pools={luc_pk_client = ["one"]}'], 'does not begin with "luc_pk_"'),
    ],
)
def test_unusual_keys_are_warned_of(arguments: list[str], expected: str) -> None:
    """What is allowed and seldom meant is said, without keys."""
    (warning,) = with_sets(*arguments).warnings()
    assert expected in warning
    assert "luc_pk_one" not in warning


def test_every_secret_is_masked() -> None:
    """print-config shows that keys are set, and none of them."""
    secrets = [f"keys.default={CLIENT}", f'keys.listed=["{ONE}"]', f"keys.pools={POOLS}", "keys.accept=listed"]
    loaded = with_sets(*secrets, "data_api.token=luc_api_held", 'data_api.client_tokens=["handed-out-to-one"]')
    text = render_effective(loaded.config, loaded.origins)
    assert not any(secret in text for secret in ("luc_pk", "luc_api", "handed-out"))
    for option in options().values():
        if option.secret:
            assert f'{option.name} = "{MASK}"' in text


def test_learned_limit_is_a_word() -> None:
    """`auto` needs no quotes on the command line, and is printed with them."""
    loaded = with_sets("budget.requests_per_minute=auto")
    assert loaded.config.budget.requests_per_minute == "auto"
    assert 'requests_per_minute = "auto"' in render_effective(loaded.config, loaded.origins)
