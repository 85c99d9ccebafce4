"""Which rule takes which parameter of a model, and why."""
