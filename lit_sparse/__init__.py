"""Fine-tune language models while changing few of their weights, and know what that costs."""
