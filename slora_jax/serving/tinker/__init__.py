"""Tinker's API for training over HTTP, for the public `tinker` client."""
