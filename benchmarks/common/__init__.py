"""What the index benchmarks share: vectors with their exact top-k, measures of a result, timing, the plot."""
