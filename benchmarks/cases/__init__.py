"""The cases of the suite: a file for each operator, a line for each case."""
