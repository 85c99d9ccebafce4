"""A report of training runs: an HTML page and its charts, from the files that the Trainer writes."""
