"""The Starlette application: routes, the wire format, JSON errors."""
