from medmm_ray.config import Config


class Recipe(Config):
    run: str
    skip: tuple[str, ...] = ()
    max_error_rate: float = 0.01
