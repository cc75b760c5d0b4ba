"""Pixels, sound, brain signals, tokens → features: one architecture a file."""
