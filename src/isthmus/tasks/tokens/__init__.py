"""Image tokens: a tokenizer and its prior, decoding compared, exactness judged, other people's models."""
