"""DeepSpeed's engine: its config, the model it wraps, and the weights it starts from."""
