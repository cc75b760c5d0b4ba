"""Look inside: linear interpreters, relevance, inversion, dissection, receptive fields, circuits, cost."""
