"""HTTP: the Starlette application with its middleware and routes, and uvicorn with limits for slow clients."""
