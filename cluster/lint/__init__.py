"""What lies in cluster/, checked without a cloud, a cluster or Docker: ``python -m cluster.lint``.

A rule is a function: the first line of its docstring is what it holds, and it yields what is wrong.
"""
