"""From a client's request to events on disk."""
