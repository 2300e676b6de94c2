"""The version, in a module that the build reads without importing TensorFlow."""

__version__ = "0.1.0"
