"""Learning which KV heads need the whole context: gates as DuoAttention (arXiv 2410.10819) trains them."""
