"""One file a paper: `Config`, `run()`, `apply()`; the only place that knows about everything."""
