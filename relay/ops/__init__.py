"""Ops: what operators see of a running relay."""
