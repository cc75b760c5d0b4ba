"""Pixels → features: one architecture a file."""
