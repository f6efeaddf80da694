"""Fuzzing guided by coverage: `python -m tests.fuzz [TARGET …] [--seconds N] [--keep]`.

What a run finds lies in `.venv/fuzz/TARGET`, so that the next one begins where it ended; an input that breaks a promise
lies beside it, named in the last lines. Status 1 if there is one. It becomes a file of `corpus/`, or an example of the
test that ought to have had it, together with what mends it.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import zlib
from contextlib import suppress
from pathlib import Path

import zstandard

from tests.contract import bodies

try:
    import atheris
except ModuleNotFoundError:
    sys.exit("atheris is not installed: `make fuzz` does so, but it has wheels for Linux on x86-64 only")

with atheris.instrument_imports(include=["relay.protocol", "relay.http"], exclude=["relay.sandbox"]):
    from tests.fuzz.targets import TARGETS

KEPT = Path(__file__).parent / "corpus"
FOUND = Path(__file__).parents[2] / ".venv" / "fuzz"

_MAX_INPUT_BYTES = 4_096
"""Enough for a batch with a few events; speed matters more than size."""

_MAX_PLAIN_BYTES = 10_000
"""Compressed, it fits an input as a rule."""

_HTTP = [
    *(line + b"\r\n" for line in b"GET /out HTTP/1.1|POST /in HTTP/1.1|HTTP/1.0|Host: a|X-Refuse: 1|0\r\n".split(b"|")),
    *(
        line + b"\r\n"
        for line in b"Content-Length: 3|Transfer-Encoding: chunked|Expect: 100-continue|3;a=b".split(b"|")
    ),
    *(
        line + b"\r\n"
        for line in b"Connection: close|Connection: upgrade|Upgrade: x|PRI * HTTP/2.0|CONNECT a".split(b"|")
    ),
]
_JSON = [*bodies.NUMBERS, *bodies.TEXTS, *bodies.VALUES, *bodies.NAMES, *bodies.CULPRITS, *bodies.ENDS]
_MAGICS = [b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"\x78\x9c"]
_TOKENS = {"listener": _HTTP, "codings": _MAGICS, "decoder": _JSON, "lenient": _JSON}
"""What libFuzzer puts in, beside bytes of its own."""


def mutate_json(data: bytes, max_bytes: int, seed: int) -> bytes:
    """Mutate a JSON value by its structure every other time, and by its bytes otherwise or if it is none."""
    chance = random.Random(seed)
    if chance.random() < 0.5:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict | list):
            return bodies.mutate_structure(value, chance)[:max_bytes]
    return bytes(atheris.Mutate(data, max_bytes))


def mutate_coded(data: bytes, max_bytes: int, seed: int) -> bytes:
    """Mutate what was compressed every other time, and compress it anew; the compressed bytes otherwise."""
    chance = random.Random(seed)
    if chance.random() < 0.5:
        return bytes(atheris.Mutate(data, max_bytes))
    coded = None
    for window_bits in (31, 15, -15):
        with suppress(zlib.error):
            plain = zlib.decompressobj(window_bits).decompress(data[1:], _MAX_PLAIN_BYTES)
            compressor = zlib.compressobj(chance.randrange(10), wbits=window_bits, strategy=chance.randrange(5))
            coded = compressor.compress(atheris.Mutate(plain, _MAX_PLAIN_BYTES)) + compressor.flush()
            break
    if coded is None:
        with suppress(zstandard.ZstdError):
            plain = zstandard.ZstdDecompressor().stream_reader(data[1:]).read(_MAX_PLAIN_BYTES)
            zstd = zstandard.ZstdCompressor(chance.choice((1, 3)), write_checksum=chance.random() < 0.5)
            coded = zstd.compress(atheris.Mutate(plain, _MAX_PLAIN_BYTES))
    if coded is None:
        return bytes(atheris.Mutate(data, max_bytes))
    behind = data[1:] if chance.random() < 0.2 else b""  # a second member or frame
    return (data[:1] + coded + behind)[:max_bytes]


_MUTATORS = {"codings": mutate_coded, "decoder": mutate_json, "lenient": mutate_json}


def main() -> int:
    """Fuzz one target in this process, or each in one of its own."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; all without one")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (60)")
    parser.add_argument(
        "--keep", action="store_true", help="add to the kept corpus what reaches further, and do no more"
    )
    arguments, words = parser.parse_known_args()
    names: list[str] = arguments.targets or list(TARGETS)
    if unknown := set(names) - set(TARGETS):
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    if len(names) > 1:
        command = [sys.executable, "-m", "tests.fuzz", f"--seconds={arguments.seconds}", *["--keep"] * arguments.keep]
        return max(subprocess.run([*command, name], check=False).returncode for name in names)
    (name,) = names
    # libFuzzer runs itself for --keep, by the first word, and then has all further words from itself.
    command = [f"{sys.executable} -m tests.fuzz {name}", *(words or choose_options(name, arguments))]
    atheris.Setup(command, TARGETS[name], custom_mutator=_MUTATORS.get(name))
    atheris.Fuzz()  # ends the process
    return 1


def choose_options(name: str, arguments: argparse.Namespace) -> list[str]:
    """Return what libFuzzer is told of a target; its dictionary and its place for what is found are there."""
    kept, found = KEPT / name, FOUND / name
    found.mkdir(parents=True, exist_ok=True)
    dictionary = FOUND / f"{name}.dict"
    dictionary.write_text("".join(map(_quoted, filter(None, _TOKENS[name]))))
    words = [f"-max_len={_MAX_INPUT_BYTES}", f"-dict={dictionary}", f"-artifact_prefix={found}-"]
    if arguments.keep:
        return [*words, "-merge=1", str(kept), str(found)]
    return [*words, f"-max_total_time={arguments.seconds}", "-print_final_stats=1", str(found), str(kept)]


def _quoted(token: bytes) -> str:
    return '"' + "".join(f"\\x{byte:02x}" for byte in token) + '"\n'


if __name__ == "__main__":
    sys.exit(main())
