"""The memories of a layer as values: the layout of a call in chunks, rings, the unbounded cache, the eidetic set."""
