"""Exporting a run: a Hugging Face folder, a delta, a PEFT adapter, generated text."""
