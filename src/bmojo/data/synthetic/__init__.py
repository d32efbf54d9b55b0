"""Synthetic tasks, one generator a file: seeded, vectorised, random access by batch number."""
