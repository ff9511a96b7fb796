"""Multimodal process reward models for medicine, on Ray.

Importing the package, or any step of it, loads no model library: each engine imports its own in its constructor.
"""

__version__ = "0.1.0"
