"""Held-out episodes: which ones, playing them, counting them, writing down what came of them."""
