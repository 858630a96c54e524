"""Single entries of weight matrices: which are chosen, and the layers that train them."""
