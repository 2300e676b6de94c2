"""What `compare.py` is made of: the works, how the sides take turns, the tables.

The sides themselves are in `peers`, and run in other processes.
"""
