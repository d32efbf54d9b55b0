"""Where blocks of tokens are kept and found again: one small interface, and the engines behind it."""

from bmojo.memory.engines.block import Block, decode, encode
from bmojo.memory.engines.engine import Engine, Found

__all__ = ["Block", "Engine", "Found", "decode", "encode"]
