"""Layers whose inputs are computed back from their outputs, so that the backward pass needs no stored activations."""
