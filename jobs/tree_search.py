"""questions, evidence -> trees, and from them tree_solutions and tree_labels: a search tree a question, by vLLM."""

import sys
from functools import partial

import pyarrow as pa

from jobs.entry import main
from jobs.step import Job
from medmm_ray.data.tables import chosen
from medmm_ray.steps.tree_search import labels_batch, solutions_batch, tree_search


def run(job: Job) -> None:
    """Make trees, then tree_solutions and tree_labels from them."""
    config = job.config
    questions = job.read("questions", ["question_id", "split"])
    ids = [row["question_id"] for row in questions.to_pylist() if row["split"] in config.splits]
    model, policy, config_hash = job.run.model("policy"), job.run.policy_id(job.step), job.run.fingerprint(job.step)
    all_questions = job.table("questions").dataset(rows_per_block=config.engine.batch_size)
    with job.lookup_folder("trees") as folder:
        job.make(
            "trees",
            chosen(all_questions, "question_id", pa.array(ids, pa.string())),
            ids,
            lambda ds: tree_search(
                ds,
                config,
                model=model,
                policy=policy,
                config_hash=config_hash,
                evidence=job.lookup("evidence", ["documents"], folder) if config.num_documents else None,
                equivalence=job.recipe.sample.equivalence,
                apis=job.run.apis,
            ),
            "question_id",
        )
    # From trees to tables without an engine: another look_back labels the same trees anew.
    trees = job.table("trees").dataset()
    job.make(
        "tree_solutions", trees, ids, lambda ds: ds.map_batches(solutions_batch, batch_format="pyarrow"), "question_id"
    )
    job.make(
        "tree_labels",
        trees,
        ids,
        lambda ds: ds.map_batches(partial(labels_batch, strength=config.look_back), batch_format="pyarrow"),
        "question_id",
        "labels",
    )


if __name__ == "__main__":
    sys.exit(main("tree_search"))
