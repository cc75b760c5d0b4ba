"""Pixels → the features that a codebook quantises."""
