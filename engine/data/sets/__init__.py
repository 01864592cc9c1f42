"""Embedded sets and published small ones, and the readers of their archives."""
