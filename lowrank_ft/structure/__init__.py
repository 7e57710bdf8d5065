"""Nodes, which describe replaced modules as plain data, and the registries of methods and node kinds."""
