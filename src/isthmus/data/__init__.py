"""Where batches come from: built-in, a folder, parquet, the hub, shards."""
