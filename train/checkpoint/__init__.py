"""Checkpoints: what is saved, and the commit protocol that makes a save whole."""
