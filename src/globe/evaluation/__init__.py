"""What a compressed model is worth: perplexity, divergence, activation errors, spot checks, sizes, tasks."""
