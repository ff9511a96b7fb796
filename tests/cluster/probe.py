"""A job that says where it runs: `python -m tests.cluster.probe /absolute/answer.json`, submitted by test_submit."""

import json
import os
import sys
from pathlib import Path

import medmm_ray
from medmm_ray.session import session


def place() -> dict[str, str]:
    import medmm_ray

    return {"python": sys.executable, "package": medmm_ray.__file__, "folder": str(Path.cwd())}


def main() -> None:
    import ray

    files = [p for p in Path.cwd().rglob("*") if p.is_file()]
    with session():
        worker = ray.get(ray.remote(place).remote())
        answer = {
            "driver": place(),
            "worker": worker,
            "address": os.environ["RAY_ADDRESS"],
            "cpus": ray.cluster_resources()["CPU"],  # type: ignore[no-untyped-call]
            "uploaded_bytes": sum(p.stat().st_size for p in files),
            "uploaded": sorted({p.relative_to(Path.cwd()).parts[0] for p in files}),
        }
    Path(sys.argv[1]).write_text(json.dumps(answer))
    print(f"probe: {len(files)} files, medmm_ray {medmm_ray.__version__}")


if __name__ == "__main__":
    main()
