"""The sans-IO core: bytes, numbers and `now` in, values out. No file, socket, clock or logger anywhere below."""
