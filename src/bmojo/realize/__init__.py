"""Stochastic realization: linear systems, their forms and filters, and their identification from data (float64)."""
