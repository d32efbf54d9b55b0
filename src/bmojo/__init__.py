"""B'MOJO: sequence models whose layers read four memories."""

__version__ = "0.1.0"
