"""Recipes: YAML only, composed by Hydra."""
