"""The name by which Serve finds the application: ``serve run medmm_ray.serve:build_app model=<checkpoint>``."""

from medmm_ray.service.deployment import build_app

__all__ = ["build_app"]
