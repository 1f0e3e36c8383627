"""Guessing the next tokens without the model, so that one pass over the weights can verify several."""
