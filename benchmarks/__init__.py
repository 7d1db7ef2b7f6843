"""Measured claims come from here: ``make bench`` on a machine with a Hopper GPU."""
