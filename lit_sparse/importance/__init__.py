"""Importance of weights: what recorders save, and the matrices that it is recorded for."""
