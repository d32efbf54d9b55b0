"""Checkpoints of other families in, and the plain corners of this one out.

    from bmojo.convert import convert
    convert("path/to/a/llama", "converted")                     # then BMojoLM.load("converted")
    convert("path/to/a/llama", "streaming", window=1024)        # attention over a window: constant memory
    convert("converted", "llama-again", to="llama")

`docs/convert.md` says what maps to what.
"""

from __future__ import annotations

from bmojo.convert.job import FORMATS, Conversion, convert, export_model, import_model
from bmojo.convert.mapping import ConversionError

__all__ = ["FORMATS", "Conversion", "ConversionError", "convert", "export_model", "import_model"]
