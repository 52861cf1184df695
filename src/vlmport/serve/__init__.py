"""Serve models over HTTP, and fetch what a request names."""
