"""Drawing from a prior or a language model, fast (speculative, parallel, distilled) and faithful (contrastive)."""
