"""Universal prediction: what the best transductive predictor could do, and how far a model is from it."""
