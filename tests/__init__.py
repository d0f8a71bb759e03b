"""Tests; may import anything."""
