"""Shared parts of methods without a backward pass: forward passes with perturbed weights, directions, curvature."""
