"""The server without a process of its own: one request by a function call, or inside another server's app."""
