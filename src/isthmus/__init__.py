"""Isthmus: encoders, bottlenecks and decoders that cross."""

__version__ = "0.1.0"
