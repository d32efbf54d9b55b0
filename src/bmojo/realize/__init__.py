"""Stochastic realization: linear systems, their forms and filters, and their identification from data (float64).

`LTI` is a linear system driven by white noise; `bmojo.realize.identify` finds one from data; `LTI.to_layer` starts a
layer from it. All in numpy; scipy (extra `realize`) and torch are imported by what needs them.
"""

from bmojo.realize.identify import cva, ho_kalman
from bmojo.realize.lti import LTI, Filtered, Innovations

__all__ = ["LTI", "Filtered", "Innovations", "cva", "ho_kalman"]
