"""Records of the cost of training runs: memory, time, energy. Imports neither Lightning nor lit_sparse."""
