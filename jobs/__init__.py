"""The Ray Data jobs: build and answer. The only package that imports ray."""
