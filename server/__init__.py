"""A self-hosted VAE decode server."""

__version__ = "0.1.0"
