"""Text from a model, one token at a time."""

from bmojo.generate.stream import Stream, generate, load_stream_state

__all__ = ["Stream", "generate", "load_stream_state"]
