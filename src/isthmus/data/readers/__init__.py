"""Sources that read a person's own files: pictures, tables, shards, recordings, the hub."""
