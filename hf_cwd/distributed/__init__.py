"""Where the parts of a parameter live, and how whole matrices are put together."""
