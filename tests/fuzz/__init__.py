"""Fuzzing of what reads others' words: `make fuzz`, and a sample of it in every `make test`."""
