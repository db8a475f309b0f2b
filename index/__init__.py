"""Key indexes and exact top-k. No Ray, no transformers; of rabatch only `errors` and `config`."""
