"""The disk: what was accepted and is not yet upstream, and what must be remembered of the rest."""
