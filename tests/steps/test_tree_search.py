"""tree_search: the tree by hand-computed values, and the search with a scripted engine."""

import asyncio
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from rich.console import Console

from jobs import bench
from jobs.benches import tree_search as tree_bench
from jobs.benches.scripted import ScriptedGenerator, cut
from medmm_ray.data.records import Labels, Question, Solutions, Tree, from_dict, to_arrow
from medmm_ray.data.tables import RowError
from medmm_ray.engines.chat import ChatPrompt
from medmm_ray.engines.generator import Completion, Sampling
from medmm_ray.engines.grader import Grader
from medmm_ray.engines.llm.access import connect
from medmm_ray.engines.llm.budget import ApiBudget
from medmm_ray.engines.llm.client import ApiConfig, ApiEngine
from medmm_ray.steps.tree_search import TreeSearchActor, TreeSearchConfig, labels_batch, solutions_batch, tree_search
from medmm_ray.steps.tree_search.tree import (
    ROOT,
    close,
    grow,
    leaves,
    look_back,
    next_action,
    num_right,
    num_rollouts_at,
    select,
    solution_leaves,
    step_labels,
    steps_to,
    ucb,
    unfinished_leaves,
)
from medmm_ray.steps.tree_search.writer import Continuation, StepWriterEngine
from tests.doubles.api_server import chat_said, failed, serving
from tests.doubles.fake_generator import FakeGenerator

CONFIG = TreeSearchConfig()
RIGHT, WRONG = "the answer is (B).", "the answer is (A)."


def stated(*steps: str, correct: bool) -> Continuation:
    return Continuation(steps, "B" if correct else "A", correct)


# The tree, by hand


def test_values_visits_and_choices_of_a_small_tree_by_hand() -> None:
    tree = grow((ROOT,), 0, "reason", Continuation(("a",)), [True, False])
    assert (tree[1].value, tree[1].visits, tree[1].num_correct, tree[1].num_rollouts) == (0.5, 1, 1, 2)
    assert (tree[0].value, tree[0].visits) == (0.25, 1)
    tree = grow(tree, 0, "reason", Continuation(("b",)), [True, True])
    assert (tree[0].value, tree[0].visits) == (0.5, 2)  # (.25 + (.5 + 1) / 2) / 2

    assert select(tree, exploration=2.0) == 2
    assert (next_action(tree, 1, CONFIG), next_action(tree, 2, CONFIG)) == ("reason", "finish")
    tree = grow(tree, 2, "finish", stated("x", RIGHT, correct=True))
    assert steps_to(tree, 4) == ["b", "x", RIGHT]
    assert [(n.value, n.visits, n.closed) for n in tree[2:]] == [(1.0, 2, True), (1.0, 2, True), (1.0, 1, True)]
    assert tree[0].value == pytest.approx((0.5 + 2.5 / 3) / 2)
    assert tree[3].num_rollouts is None  # a step on the way is not rolled out

    assert select(tree, exploration=2.0) == 1  # the better child is closed
    tree = grow(tree, 1, "reason", stated(WRONG, correct=False))
    assert (tree[1].value, tree[1].visits, tree[1].closed, tree[5].closed) == (0.25, 2, False, False)
    assert tree[0].value == pytest.approx((2 / 3 + 0.625) / 2)

    assert select(tree, exploration=2.0) == 5
    assert next_action(tree, 5, CONFIG) == "reflect"
    tree = grow(tree, 5, "reflect", stated("But wait, no.", RIGHT, correct=True))
    assert (tree[5].value, tree[1].value) == (0.25, 0.25)  # (0 + .5) / 2; the doubt itself began with 0
    assert [tree[i].closed for i in (0, 1, 5, 6, 7)] == [True] * 5
    assert select(tree, exploration=2.0) is None
    assert (solution_leaves(tree), num_right(tree), unfinished_leaves(tree)) == ([4, 7], 2, [])

    labels = step_labels(tree, 7)
    assert [label.value for label in labels] == [0.25, 0.25, 0.5, 1.0]
    assert [label.label for label in labels] == [1, 1, 1, 1]
    assert [(label.num_correct, label.num_rollouts) for label in labels] == [(1, 2), (0, 0), (None, None), (0, 0)]


def test_failed_is_not_wrong() -> None:
    tree = grow((ROOT,), 0, "reason", Continuation(("a",)))
    assert (tree[1].value, tree[1].visits, tree[1].num_correct, tree[1].num_rollouts) == (None, 1, 0, 0)
    assert (tree[0].value, tree[0].visits) == (0.0, 1)
    tree = grow(tree, 0, "reason", Continuation(("b",)), [True, False])
    assert (tree[0].value, tree[0].visits) == (0.25, 2)  # (0 + .5) / 2: a is no part of the mean
    assert select(tree, exploration=0.0) == 2
    assert (next_action(tree, 1, CONFIG), unfinished_leaves(tree)) == ("reason", [2, 1])

    tree = grow(tree, 1, "reason", stated(WRONG, correct=False))
    tree = grow(tree, 1, "finish", stated("x", RIGHT, correct=True))  # x begins with a's value of 0
    assert [(n.value, n.visits) for n in tree[2:]] == [(0.5, 1), (0.0, 1), (0.5, 2), (1.0, 1)]
    assert (tree[1].value, tree[1].visits) == pytest.approx((1 / 6, 3))  # 0 at first, then (0 + (0 + .5 x 2) / 3) / 2
    assert [(label.value, label.num_rollouts) for label in step_labels(tree, 5)[1:]] == [(0.5, None), (1.0, 0)]


def test_an_answer_that_nobody_could_grade_ends_its_path_and_is_worth_nothing() -> None:
    tree = grow((ROOT,), 0, "reason", Continuation(("the answer is hydrothorax.",), "hydrothorax"))
    assert (tree[1].value, tree[1].correct, tree[1].closed) == (None, None, True)
    assert (tree[0].value, tree[0].closed, num_right(tree), solution_leaves(tree)) == (0.0, True, 0, [1])
    [label] = step_labels(tree, 1)
    assert (label.label, label.value, label.num_correct, label.num_rollouts) == (None, None, 0, 0)


def test_a_wrong_answer_is_doubted_once_a_path() -> None:
    tree = grow((ROOT,), 0, "reason", stated(WRONG, correct=False))
    assert not tree[1].closed
    assert grow((ROOT,), 0, "reason", stated(WRONG, correct=False), reflect=False)[1].closed
    tree = grow(tree, 1, "reflect", stated("But wait, no.", WRONG, correct=False))
    assert [node.closed for node in tree] == [True] * 4


def test_ucb_by_hand() -> None:
    tree = grow((ROOT,), 0, "reason", Continuation(("a",)), [True, False])
    parent = replace(ROOT, value=0.75, visits=3)
    assert ucb(tree[1], parent, 2.0) == pytest.approx(0.5 + 2 * math.sqrt(math.log(3)))
    assert ucb(replace(tree[1], value=None), parent, 2.0) == pytest.approx(0.75 + 2 * math.sqrt(math.log(3)))
    assert ucb(ROOT, parent, 2.0) == 5.0


def test_exploration_prefers_the_rarely_visited() -> None:
    tree = grow((ROOT,), 0, "reason", Continuation(("a",)), [True, True, False])
    tree = grow(tree, 0, "reason", Continuation(("b",)), [False])
    tree = grow(tree, 1, "reason", Continuation(("c",)), [True, False])
    assert select(tree, exploration=0.0) == 3
    assert select(tree, exploration=2.0) == 2  # 7/12 + 2 sqrt(ln 3 / 2) = 2.07 < 2 sqrt(ln 3 / 1) = 2.10


def test_a_dead_end_closes_what_it_leaves_hopeless() -> None:
    tree = grow((ROOT,), 0, "reason", Continuation(("a",)), [True])
    tree = grow(tree, 0, "reason", Continuation(("b",)), [True])
    tree = grow(tree, 1, "reason", Continuation(("c",)), [False])
    tree = close(tree, 3)
    assert [node.closed for node in tree] == [False, True, False, True]
    assert select(tree, 2.0) == 2
    assert select(close(tree, 2), 2.0) is None
    assert (leaves(tree), unfinished_leaves(tree)) == ([2, 3], [2])
    assert close((ROOT,), 0)[0].closed


def test_rollouts_by_depth_and_the_last_step_that_is_allowed() -> None:
    assert [num_rollouts_at(depth, CONFIG) for depth in range(6)] == [20, 10, 6, 5, 5, 5]
    tree = grow((ROOT,), 0, "reason", Continuation(("a",)), [False])
    assert next_action(tree, 1, TreeSearchConfig(max_steps=2)) == "finish"
    assert next_action(tree, 1, TreeSearchConfig(max_steps=3)) == "reason"


def test_look_back_labels_by_hand() -> None:
    assert look_back([0.5, 0.25, 0.0, 0.5]) == [1, 0, 0, 1]  # .5, 0, 0, 1
    assert look_back([0.25, 0.75, 0.5]) == [1, 1, 0]  # .25, 1.25, -.25
    assert look_back([0.25, 0.75, 0.5], strength=0.0) == [1, 1, 1]
    assert look_back([0.0, 0.25], strength=1.0) == [0, 1]
    assert look_back([]) == []
    assert look_back([None, 0.5, None, 0.25, None]) == [None, 1, None, 0, None]  # .25 - (.5 - .25) = 0


# The search, with a scripted engine


class Scripted(FakeGenerator):
    """A fake that stops at the texts of `Sampling.stop`, as the engine does."""

    async def generate(self, prompt: ChatPrompt, n: int, seed: int, sampling: Sampling) -> list[Completion]:
        found = await super().generate(prompt, n, seed, sampling)
        await asyncio.sleep(seed % 7 / 1e4)  # requests end in another order than they began
        return [replace(completion, text=cut(completion.text, sampling.stop)) for completion in found]


def question(question_id: str = "q1", **changes: Any) -> Question:
    values: dict[str, Any] = {
        "question_id": question_id, "source": "phantom", "split": "train", "modality": "radiology",
        "difficulty": "easy", "question": f"What is {question_id}?", "options": ["air", "fluid"], "answer": "B",
        "answer_type": "choice", "image_ids": [],
    }  # fmt: skip
    return Question(**{**values, **changes})


def guess(prompt: str, seed: int) -> str:
    """What a policy without a picture may write: it looks, tests an option, answers; mostly as it has begun."""
    rng = random.Random(f"{prompt}{seed}")
    said = prompt.count("Step ") - 1
    look, other = (" See fluid.", "B"), (" See air.", "A")
    if "See" in prompt:
        letter = "B" if ("fluid." in prompt) != (rng.random() < 0.2) else "A"
        text = ""
    else:
        begun_with, letter = rng.choice([look, other])
        text = f" Look{rng.randrange(2)}.\nStep 2:{begun_with}\nStep 3:" if said == 0 else f"{begun_with}\nStep 3:"
    return f"{text} So the answer is ({letter})."


def run(script: Any, questions: list[Question], grader: Any = None, **config: Any) -> tuple[list[Tree], Scripted]:
    fake = Scripted(script)
    actor = TreeSearchActor(TreeSearchConfig(**config), "m", "tiny", "c0", generator=fake, grader=grader)

    async def work() -> list[pa.Table]:
        return [out async for out in actor(to_arrow(Question, questions))]

    [table] = asyncio.run(work())
    return [from_dict(Tree, row) for row in table.to_pylist()], fake


def test_a_tree_is_the_same_whatever_grows_beside_it() -> None:
    asked = [question(f"q{i}") for i in range(6)]
    together, _ = run(guess, asked)
    alone = [run(guess, [one])[0][0] for one in reversed(asked)][::-1]
    assert together == alone
    assert len({tuple(tree.nodes) for tree in together}) == 6
    assert all(tree.error is None for tree in together)
    assert any(node.action == "reflect" for tree in together for node in tree.nodes)


def test_a_tree_ends_with_enough_right_solutions_and_states_wrong_ones_too() -> None:
    trees, _ = run(guess, [question(f"q{i}") for i in range(6)])
    for tree in trees:
        nodes = tuple(tree.nodes)
        assert 1 <= num_right(nodes) <= 6
        assert len(nodes) <= 60
        assert select(nodes, 2.0) is None or num_right(nodes) >= 4
    assert any(node.correct is False for tree in trees for node in tree.nodes)


def test_equal_children_become_one_and_rollouts_are_one_request() -> None:
    [tree], fake = run(lambda prompt, seed: " Look.\nStep 2: So the answer is (B).", [question()], max_nodes=2)
    assert [node.step for node in tree.nodes] == ["", "Look.", "Look.", "So the answer is (B)."]
    first, rollouts, finish = fake.requests
    assert first[:2] == ("Question: What is q1? (A) air (B) fluidStep 1:", 3)
    assert rollouts[:2] == ("Question: What is q1? (A) air (B) fluidStep 1: Look.\nStep 2:", 10)
    assert finish[1] == 1  # the tree is full, and has too few right solutions: what was begun is ended
    assert finish[0] == rollouts[0]
    assert (tree.nodes[1].num_correct, tree.nodes[1].num_rollouts) == (10, 10)


def test_cut_empty_and_answerless_samples_are_rejected_and_do_not_count() -> None:
    def script(prompt: str, seed: int) -> str:
        if prompt.endswith("Step 1:"):
            return [" Cut~", "\nStep 2:", " So the answer is (B)."][seed % 3]
        return " Nothing."

    [tree], _ = run(script, [question()])
    assert {node.step for node in tree.nodes[1:]} == {"So the answer is (B)."}
    assert tree.num_rejected == 2

    [tree], _ = run(lambda prompt, seed: " Look.\nStep 2: Nothing.", [question()])
    assert [(n.step, n.value, n.num_rollouts, n.closed) for n in tree.nodes[1:]] == [("Look.", None, 0, True)]
    assert solutions_batch(to_arrow(Tree, [tree])).to_pylist()[0]["solutions"] == []


def test_the_marks_of_a_markdown_policy_are_no_part_of_a_step() -> None:
    def script(prompt: str, seed: int) -> str:
        return " The **heart** is **wide**\n\n**Step 2:** the answer is (B)." if "heart" not in prompt else f" {RIGHT}"

    [tree], _ = run(script, [question()])
    assert tree.nodes[1].step == "The **heart** is **wide**"


def test_budgets_of_tokens_and_nodes_end_a_tree() -> None:
    few, _ = run(guess, [question()], max_nodes=4)
    assert len(few[0].nodes) <= 12
    [spent], fake = run(guess, [question()], max_tree_tokens=1)
    assert len(fake.requests) == len({node.step for node in spent.nodes}) - 1 + 1
    assert all(node.parent <= 0 for node in spent.nodes)


def test_faults_become_rows() -> None:
    def script(prompt: str, seed: int) -> str:
        raise RowError("prompt_too_long", "9 tokens")

    trees, _ = run(script, [question(), question("q2", error="image_missing: x")])
    assert [tree.error for tree in trees] == ["prompt_too_long: 9 tokens", "upstream: image_missing: x"]
    assert [len(tree.nodes) for tree in trees] == [1, 1]

    def deep(prompt: str, seed: int) -> str:
        if "Step 3:" in prompt:
            raise RowError("prompt_too_long", "9 tokens")
        return " Look.\nStep 2: Look.\nStep 3: Look."

    [tree], _ = run(deep, [question()])
    assert tree.error is None
    assert [node.step for node in tree.nodes] == ["", "Look.", "Look."]


def test_no_gold_answer_in_a_prompt() -> None:
    _, fake = run(lambda p, s: " Look.\nStep 2: the answer is x.", [question(answer="the secret", answer_type="open")])
    assert len(fake.requests) > 3
    assert all("secret" not in prompt for prompt, _, _ in fake.requests)


def test_open_answers_are_graded_by_the_model_that_the_recipe_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step, then an answer that only a model can grade; a model that does not answer leaves it ungraded."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    asked = question(options=[], answer="Pleural effusion", answer_type="open")

    def script(prompt: str, seed: int) -> str:
        return " Look.\nStep 2: the answer is hydrothorax."

    def grown(*said: Any, name: str) -> Tree:
        with serving() as server:
            engine = ApiEngine(kind="openai")
            api = ApiConfig(endpoint=server.address, in_flight=1, max_attempts=1)
            server.script = list(said)
            folder = str(tmp_path / name)

            def grader() -> Grader:
                return Grader(connect(engine, "gpt-4o", api, ApiBudget(folder, api.limits), folder))

            [tree], _ = run(script, [asked], grader, max_nodes=2)
            return tree

    by_form = run(script, [asked], max_nodes=2, reflect=False)[0][0]
    assert [(n.value, n.num_rollouts, n.correct) for n in by_form.nodes[1:2]] == [(0.0, 10, None)]
    assert by_form.nodes[-1].correct is False
    same = grown(*[chat_said('{"same": true}')] * 9, name="same")
    assert [(n.value, n.num_correct, n.num_rollouts) for n in same.nodes[1:2]] == [(1.0, 10, 10)]
    assert (same.nodes[-1].answer, same.nodes[-1].correct) == ("hydrothorax", True)
    failing = grown(*[failed(500)] * 9, name="failing")
    assert [(n.value, n.num_correct, n.num_rollouts) for n in failing.nodes[1:2]] == [(None, 0, 0)]
    assert (failing.nodes[-1].answer, failing.nodes[-1].correct) == ("hydrothorax", None)


def test_solutions_and_labels_of_a_tree_belong_together() -> None:
    trees, _ = run(guess, [question("q1"), question("q2")])
    table = to_arrow(Tree, trees)
    made = [from_dict(Solutions, row) for row in solutions_batch(table).to_pylist()]
    nested = labels_batch(table, 1.0).to_pylist()
    for tree, row, own in zip(trees, made, nested, strict=True):
        labels = [from_dict(Labels, label) for label in own["labels"]]
        assert [s.solution_id for s in row.solutions] == [label.solution_id for label in labels]
        assert len({s.solution_id for s in row.solutions}) == len(row.solutions) == row.num_requested > 1
        for solution, label in zip(row.solutions, labels, strict=True):
            assert (label.source, label.annotator) == ("tree_search", "tiny@c0")
            assert len(label.steps) == len(solution.steps)
            assert label.steps[-1].value == float(bool(solution.correct))
            assert solution.text.endswith(f"Step {len(solution.steps)}: {solution.steps[-1]}")
            assert solution.correct == (solution.answer == "B")
        assert tree.question_id == own["question_id"] == row.question_id


def test_a_policy_that_looks_is_refused() -> None:
    with pytest.raises(ValueError, match="num_images is 1"):
        StepWriterEngine(num_images=1)


def test_documents_need_evidence() -> None:
    with pytest.raises(ValueError, match="num_documents=2 needs the table evidence"):
        tree_search(None, TreeSearchConfig(num_documents=2), model="m", policy="p", config_hash="c")  # type: ignore[arg-type]


def test_the_benchmark_grows_the_same_trees_together_and_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policies: list[str] = []

    def engine_of(policy: str, engine: StepWriterEngine) -> Sleeping:
        policies.append(policy)
        return Sleeping(policy, engine, pause_s=0.01)

    monkeypatch.setattr(tree_bench, "train_toy_policy", lambda folder, config: f"{folder} of {config.epochs} epochs")
    monkeypatch.setattr(tree_bench, "Generator", engine_of)
    words = ["questions=6", "alone=2", "policy.epochs=4", f"json={tmp_path / 'rows.json'}"]
    assert bench.main(["tree_search", *words]) == 0
    assert [policy.rpartition("/")[2] for policy in policies] == ["policy of 4 epochs"]
    [row, beside, tokens, nodes] = json.loads((tmp_path / "rows.json").read_text())
    assert row["ours"] > row["baseline"] > 0
    assert row["ours"] == beside["ours"] > beside["baseline"] > 0
    assert tokens["ours"] > tokens["baseline"] > 0
    assert nodes["ours"] > 3


def test_the_benchmark_refuses_a_tree_that_is_another_when_it_grows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(Sleeping):
        """Its texts depend on how often it was asked."""

        async def generate(self, prompt: ChatPrompt, n: int, seed: int, sampling: Sampling) -> list[Completion]:
            self.statistics.output_tokens += 1
            return await super().generate(prompt, n, seed + self.statistics.output_tokens, sampling)

    monkeypatch.setattr(tree_bench, "train_toy_policy", lambda folder, config: folder)
    monkeypatch.setattr(tree_bench, "Generator", lambda policy, engine: Forgetful(policy, engine, pause_s=0.0))
    with pytest.raises(AssertionError, match="the tree of test-0 is another when it grows alone"):
        list(tree_bench.measure(tree_bench.BenchConfig(questions=2, alone=1), Console(quiet=True)))


class Sleeping(ScriptedGenerator):
    """An engine that takes a moment for each request, however many there are at a time."""

    def shutdown(self) -> None:
        pass
