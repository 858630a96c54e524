"""Blocks of weight matrices: where they are, which are chosen, and the layers that train them."""
