"""Answers of a model, here or on a server, and how good they are."""
