"""Attention variants; each takes hidden states and document ids and returns hidden states."""
