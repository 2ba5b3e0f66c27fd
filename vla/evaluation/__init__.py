"""Held-out episodes: choosing, running, counting and reporting them."""
