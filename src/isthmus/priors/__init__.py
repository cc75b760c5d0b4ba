"""Models of codes: autoregressive, next-scale, masked diffusion, probabilistic circuits, small language models."""
