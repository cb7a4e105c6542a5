"""Continuous signals over radial basis functions: plain functions on tensors, no learned parameters."""
