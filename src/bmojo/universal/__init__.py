"""Universal prediction: references that are computable exactly, and compression with any predictor."""
