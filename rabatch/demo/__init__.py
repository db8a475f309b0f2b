"""A demo that needs no download: a small model that answers questions, and the synthetic documents it reads."""
