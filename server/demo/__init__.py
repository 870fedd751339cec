"""The embedded default model, its sample latents, and the script that made both. Holds files, knows no server code."""
