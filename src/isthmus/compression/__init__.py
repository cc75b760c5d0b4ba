"""Make a network smaller: relevance pruning, learned codebooks, one-way filters, fixed point."""
