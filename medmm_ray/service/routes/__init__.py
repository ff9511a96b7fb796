"""The routes of the service: a module a family, each with `router(backend)`."""
