"""The schedule on virtual time: the relay's real policy against a strict upstream, recorded traffic and its rivals.

`python -m bench.simulate` prints the figures that `bench/README.md` quotes.
"""
