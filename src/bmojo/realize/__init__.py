"""Stochastic realization: linear systems, their forms and filters, and their identification from data (float64).

`LTI` is a linear system driven by white noise; `cva` finds one from a series, `ho_kalman` from Markov parameters;
`LTI.to_layer` starts a layer from it; `carleman` makes bilinear models of smooth systems. Numpy alone; scipy (extra
`realize`) and torch are imported by what needs them.
"""

from bmojo.realize.bilinear import Bilinear, carleman
from bmojo.realize.identify import cva, ho_kalman
from bmojo.realize.lti import LTI, Filtered, Innovations
from bmojo.realize.whiteness import whiteness

__all__ = ["LTI", "Bilinear", "Filtered", "Innovations", "carleman", "cva", "ho_kalman", "whiteness"]
