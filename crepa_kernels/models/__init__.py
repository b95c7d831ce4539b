"""What is known of each model: its transformer's blocks, how its tokens lie, and its VAE."""
