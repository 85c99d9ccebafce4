"""What the training scripts share: their arguments, data, models and mistakes."""
