"""What a run did, in numbers of bounded size and as one HTML page. Knows neither Ray nor transformers."""
