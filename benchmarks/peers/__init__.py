"""The sides of `compare.py`: advreg, and the libraries that it is compared with.

A module of a side has a function for each kind of work that it can do: `step`,
`evaluate`, `predict`, `attack`, `first_step`. It takes a `Job` and returns a `Task`.
Each runs in an environment that has the side's library and need not have those of the
others, so a module imports its own library, and from here what knows none of them.
"""
