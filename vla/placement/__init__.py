"""Roles on ranks of their own: which rank simulates, acts and trains, and what ranks then send to each other."""
