"""The version: read by the build, kept in what qtool writes."""

__version__ = "0.1.0"
