"""What a run needs around the maths: options, processes, data, VAE, checkpoints, monitoring."""
