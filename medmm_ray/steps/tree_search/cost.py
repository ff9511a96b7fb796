"""What a tree search costs, before it runs."""

from medmm_ray.estimate import BYTES_PER_TOKEN, Line, Sizes
from medmm_ray.steps.tree_search.tree import TreeSearchConfig


def tree_search_cost(config: TreeSearchConfig, sizes: Sizes) -> Line:
    """The line of the tree search: every tree grows to its most nodes, or tokens."""
    questions = sizes.train_questions if "train" in config.splits else 0
    nodes = questions * config.max_nodes
    # A node lies halfway through its solution, in the mean; what it continues comes from the prefix cache.
    input_tokens = questions * sizes.prefix_tokens(config.num_documents)
    step_tokens = sizes.solution_tokens / sizes.steps
    rollout_tokens = _node_rollouts(config, sizes) * sizes.solution_tokens / 2
    output_tokens = nodes * (step_tokens + rollout_tokens)
    if config.max_tree_tokens is not None:
        output_tokens = min(output_tokens, questions * config.max_tree_tokens)
    return Line(
        step="tree_search",
        work=f"{nodes:,} nodes at most",
        calls=nodes,
        tokens=input_tokens + output_tokens,
        gpu_hours=sizes.policy.gpu_hours(sizes.hardware, input_tokens, output_tokens),
        stored=nodes * step_tokens * BYTES_PER_TOKEN,
    )


def _node_rollouts(config: TreeSearchConfig, sizes: Sizes) -> float:
    """Mean rollouts of a node, over the depths of a solution."""
    depths = range(1, round(sizes.steps) + 1)
    rollouts = [max(config.min_rollouts, config.num_rollouts // (depth + 1)) for depth in depths]
    return sum(rollouts) / len(rollouts)
