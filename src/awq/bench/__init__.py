"""Measurements of what users wait for: single-query latency of a model, and of one linear by rows."""
