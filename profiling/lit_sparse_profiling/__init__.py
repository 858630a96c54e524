"""Records of what a training run took: memory ledgers, phases, throughput. Knows neither Lightning nor lit_sparse."""
