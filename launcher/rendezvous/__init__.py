"""Rendezvous of ranks and nodes."""
