"""A server for learning, and the commands of a NIM."""
