"""Recorded demonstrations: trajectory.json and the groups of trajectory.h5."""
