"""``ray start`` for another node on this machine's loopback: ``python cluster/local/worker.py start --address=...``.

Where Ray keeps to loopback (`RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0`, see up.sh) it refuses a second node, and elsewhere
it takes the machine's outer address in place of 127.0.0.1. What this node starts keeps to loopback as the head does.
"""

from ray._private import ray_constants, services
from ray.scripts.scripts import main

ray_constants.ENABLE_RAY_CLUSTER = True
services.resolve_ip_for_localhost = lambda host: host
main()
