"""Streams: text from a model, one token at a time, and into it, for any length."""

from bmojo.generate.batch import generate_batch
from bmojo.generate.sampling import Sampling
from bmojo.generate.stream import Snapshot, Stream

__all__ = ["Sampling", "Snapshot", "Stream", "generate_batch"]
