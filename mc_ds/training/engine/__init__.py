"""DeepSpeed's engine: its config, the model it wraps, and initial weights."""
