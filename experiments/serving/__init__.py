"""Clients of a server, and servers started to be measured: under load, and as replicas."""
