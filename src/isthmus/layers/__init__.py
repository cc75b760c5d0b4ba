"""Building blocks that two or more rooms share."""
