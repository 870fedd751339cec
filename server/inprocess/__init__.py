"""Use the server inside another process: run one request by a function call, or serve inside another server's app."""
