"""Pure functions on tensors. Each op has a `naive` form (the definition, sequential, float64-clean), a chunked form
(matmuls, linear in time) and, where it has a state, a form for one token. Call sites use the dispatched name.

Chunked and naive forms take sequences laid out in whole chunks (see `bmojo.memory.layout`); a padded step has
`dt = 0`, `beta = 0` or `valid = False`, and leaves every state as it is.
"""
