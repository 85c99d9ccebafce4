"""Sharded training: the same weights as one process, whatever the layout."""
