"""`python -m server`, and `python -m vae_server` where the package is installed."""

from .commands.cli import main

if __name__ == "__main__":
    main()
