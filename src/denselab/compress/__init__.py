"""From any PyTorch vision model to mixed-precision integers, in steps that can each be saved."""
