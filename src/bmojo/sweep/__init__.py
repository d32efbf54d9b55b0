"""Trains the family over a grid of settings on a synthetic task: `bmojo sweep`."""
