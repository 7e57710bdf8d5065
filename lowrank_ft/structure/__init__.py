"""Nodes as data: what can stand in a model, and the registries that it is looked up in."""
