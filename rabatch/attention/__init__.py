"""Attention over a stored context: the seam to transformers, partial results and their merge, evidence."""
