"""Settings: from what an operator wrote to a checked `Config`, and back to text.

options     the options of `relay.config` as values: type, bounds, default, reason
checks      what options must be to one another and to the world
loading     sources, their order, and every problem in them at once
rendering   a configuration as TOML
"""
