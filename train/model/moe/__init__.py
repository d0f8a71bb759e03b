"""Mixture of experts: router, expert weights, the layer that joins them."""
