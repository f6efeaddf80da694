"""The demonstration: relay, stand-in upstream and recorded sessions in one command."""
