"""Importance of weights: how it is recorded, read again, and for which matrices."""
