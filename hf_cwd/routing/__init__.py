"""Which rule trains which parameter of a model, and why."""
