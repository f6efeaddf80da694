"""From the spool to upstream: one lane a key, each spending its key's budget."""
