"""Decoding brain recordings: trials and their linear baselines, courses over time, pictures from latents, and use."""
