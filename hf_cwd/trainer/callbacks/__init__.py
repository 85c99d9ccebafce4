"""Callbacks that every Trainer has by default, once this package is imported."""
