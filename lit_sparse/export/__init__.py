"""Export of runs: a Hugging Face folder, a delta, a PEFT adapter, or generated text."""
