"""Recipes: YAML and flags in, checked values out. Nothing here imports torch."""
