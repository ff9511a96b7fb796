"""The run's two-tower reward model as a Serve application on 127.0.0.1, until Ctrl-C."""

import argparse
import signal
import sys
from collections.abc import Sequence

from jobs.entry import launch, parser, read_arguments
from jobs.step import Run
from medmm_ray.service.config import ServeConfig
from medmm_ray.service.retrieval import RetrievalConfig


def main(words: Sequence[str] | None = None) -> int:
    """Run the job; `words` are its arguments, else the command line's. Gives the exit status."""
    arguments = parser("serve", "Serve the run's reward model: POST /v1/rerank.")
    return launch(arguments, words, _main, ServeConfig)


def _main(arguments: argparse.Namespace) -> int:
    from medmm_ray.service.deployment import running
    from medmm_ray.session import session

    config = serve_config(Run(read_arguments(arguments, "serve")))
    with session(), running(config) as url:
        print(f"serving {config.model}\n  POST {url}/v1/rerank\n  page {url}/docs\nCtrl-C stops it", flush=True)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
    return 0


def serve_config(run: Run) -> ServeConfig:
    """The recipe's serve section, with the run's own model where it names none."""
    config = run.recipe.serve
    if config.retrieval is not None:
        config = config.model_copy(update={"retrieval": _retrieval(run, config.retrieval)})
    if config.model:
        return config
    return config.model_copy(update={"model": run.model("two_tower")})


def _retrieval(run: Run, config: RetrievalConfig) -> RetrievalConfig:
    """The run's own index, encoders and way of searching, where the recipe does not say others."""
    own = {
        "index": run.uri("index"),
        "image_tower": run.model("image_tower"),
        "embed": run.recipe.embed,
        "retrieve": run.recipe.retrieve,
    }
    missing = {name: value for name, value in own.items() if name not in config.model_fields_set}
    return config.model_copy(update=missing)


if __name__ == "__main__":
    sys.exit(main())
