"""Modules of the family: the mixer (the one sequence mixer), its SSMs, the block and the language model."""
