"""A report of training runs: one HTML page and its pictures, from what the Trainer leaves in a run's directory."""
