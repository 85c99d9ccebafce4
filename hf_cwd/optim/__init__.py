"""The optimizers: parameter groups, state, the step and state dicts."""
