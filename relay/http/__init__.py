"""HTTP values, the router, the fast listener, the ASGI adapter and the upstream client."""
