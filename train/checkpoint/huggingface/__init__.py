"""Hugging Face folders, both ways: one table of names, one table of keys, streamed tensor by tensor."""
