"""Using a model: many prompts, many samples of each, in batches."""
