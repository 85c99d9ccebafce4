"""Cautious Weight Decay (arXiv 2510.12402) for the Hugging Face Trainer."""

__version__ = "0.1.0"
