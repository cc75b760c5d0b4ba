"""What to learn: an objective maps a batch to a `Loss` and holds the modules that it trains."""
