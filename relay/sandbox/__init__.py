"""A stand-in for upstream: refuses, limits, remembers and fails as it would, and reports what it saw."""
