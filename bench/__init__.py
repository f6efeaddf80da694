"""Benchmarks of the relay; README.md holds what they found."""
