"""Figures of merit, as pure functions of arrays: one file per kind, each equal to an independent implementation in its test."""
