"""Importance of weights: the matrices it is recorded for, its file format, and its formulas."""
