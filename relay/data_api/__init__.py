"""Lucent's data API through the relay: a proxy that makes one token's budget serve many readers."""
