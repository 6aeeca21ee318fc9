"""Fetches released models and tokenizers, and distils one real model into another."""
