"""A driver that serves a model in the cluster of ``RAY_ADDRESS``, until its standard input ends: see test_submit."""

import sys

from medmm_ray.service.app import ServeConfig, running
from medmm_ray.session import session

if __name__ == "__main__":
    with session(), running(ServeConfig(model=sys.argv[1], port=0, num_cpus=0.5)) as url:
        print(url, flush=True)
        sys.stdin.read()
