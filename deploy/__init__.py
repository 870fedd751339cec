"""What running the server elsewhere takes; README.md here says how."""
