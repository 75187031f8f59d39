"""Recipes: what runs, in which order, as Prefect flows, and the command line."""
