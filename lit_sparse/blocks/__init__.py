"""Blocks of weight matrices: their positions, their selection, and the layers that train them."""
