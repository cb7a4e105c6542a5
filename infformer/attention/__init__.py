"""Attention as functions of query, key and value: by softmax, patterns, features, low rank, hashes or sorting."""
