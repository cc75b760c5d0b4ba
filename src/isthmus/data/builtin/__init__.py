"""Sources that need no file and no network: drawn from a seed, or shipped with scikit-learn and scikit-image."""
