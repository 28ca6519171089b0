"""Training runs: options, the Lightning module, what happens around it, and the checkpoint."""
