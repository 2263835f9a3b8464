"""Typed results of a build and the reports made of them."""
