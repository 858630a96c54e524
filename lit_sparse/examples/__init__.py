"""Small programs that use lit_sparse from Python: read them, run them with `python -m`, take what you need."""
