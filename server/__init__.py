"""A self-hosted VAE decode server."""

__version__ = "0.1.0"

# How a user runs it: the installed package has another name than the folder of the repository.
COMMAND = "python -m server" if __name__ == "server" else "vae-server"
