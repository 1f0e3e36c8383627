"""The endpoints. Each module has a `router`; `ridgeline.server.app` lists them."""
