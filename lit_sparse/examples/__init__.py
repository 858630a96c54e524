"""Small programs that use lit_sparse from Python: run them with `python -m`, or copy what you need."""
