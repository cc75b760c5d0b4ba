"""Attack and defend: natural transformations, crop selection, caption attacks."""
