"""Stage `policy`: supervised fine-tuning of a causal language model on worked solutions.

Enters: training questions and their worked solutions. Leaves: a Hugging Face checkpoint folder (safetensors, fast
tokenizer, generation config) that vLLM loads. Without a base model a small Llama starts from random weights, with a
tokenizer of its own made from the run's texts.

The worked solutions of a question share one pass over its prompt, by the reward model's shared-prefix attention: with
four a question that is 2.2 times fewer tokens on phantoms.

Legend: L tokens of a packed row, N supervised tokens, D width, V vocabulary.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pydantic import Field, model_validator

from medmm_ray.config import Config, execution
from medmm_ray.engines.chat_template import template_of
from medmm_ray.engines.checkpoints import resolve
from medmm_ray.engines.tokenizer import build_tokenizer
from medmm_ray.prompts import POLICY_SYSTEM, document_block, policy_messages, prm_messages
from medmm_ray.text import one_line, question_with_options, solution_text
from medmm_ray.train.config import QuestionTrainConfig
from medmm_ray.train.launch import fit, read_input
from medmm_ray.train.lora import LoraAdapter, LoraConfig, Segment
from medmm_ray.train.schedule import Part, Units
from medmm_ray.train.stage import Stage
from medmm_ray.train.throughput import TrainingFlops

if TYPE_CHECKING:
    import torch

    from medmm_ray.reward_model.attention import Block

VERSION = 2  # of what a step makes: raise it when the same config makes something else


class LlamaShape(Config):
    """A small Llama trained from random weights."""

    hidden_size: int = 256
    """Width."""
    num_layers: int = 4
    """Blocks."""
    num_heads: int = 4
    """Attention heads."""
    intermediate_size: int = 512
    """Width inside the MLP."""
    max_length: int = 2048
    """Longest sequence, in tokens."""
    vocab_size: int = 1024
    """Entries of its own tokenizer, special ones included."""
    tie_embeddings: bool = True
    """Share one matrix between input embeddings and head: a small model learns to copy words sooner."""


class PolicyConfig(QuestionTrainConfig):
    """Supervised fine-tuning of the policy."""

    base: str | None = None
    """The checkpoint to start from: a folder, a URI, a hub id or package:<name>. null: a small Llama from scratch."""
    shape: LlamaShape = LlamaShape()
    """The small Llama, where there is no base."""
    learning_rate: float = Field(1e-3, gt=0)
    """Highest learning rate. 1e-3 suits a small model from scratch, 1e-5 a pretrained one."""
    epochs: int = Field(3, ge=1)
    """Times that every worked solution is seen."""
    batch_size: int = Field(32, ge=1)
    """Worked solutions of one update, over all workers."""
    share_prompts: bool = True
    """The worked solutions of a question that are in one update share a pass over its prompt: cheaper, but the update
    then holds fewer questions. false: each is drawn by itself, as small updates want it."""
    max_length: int = 1024
    """Longest prompt with one solution, in tokens; a longer one is left out, never cut."""
    lora: LoraConfig | None = None
    """Train a low-rank adapter of `base`, all else frozen; null: all weights. An adapter wants a rate of about 1e-4."""
    micro_batch_tokens: int = execution(8192)
    """Most packed tokens of one forward pass of a worker; a question that has more is read in several, its prompt in
    each."""

    @model_validator(mode="after")
    def _adapts_a_base(self) -> "PolicyConfig":
        if self.lora and self.base is None:
            raise ValueError("lora adapts a pretrained model: name one as base, or train the small Llama whole")
        return self


def assistant_turn(steps: Sequence[str]) -> str:
    """Steps as the policy writes them, one a line."""
    return solution_text([one_line(step) for step in steps])


SCHEMA = pa.schema(
    {
        "question_id": pa.string(),
        "question": pa.string(),
        "answer_type": pa.string(),
        "solutions": pa.list_(pa.list_(pa.string())),
    }
)


def worked_questions(
    questions: pa.Table, demonstrations: pa.Table, share_prompts: bool = True, split: str = "train"
) -> pa.Table:
    """One row a question of `split` that has worked solutions (`SCHEMA`): its text with options, their steps.

    Without `share_prompts` there is one row a worked solution.
    """
    questions_by_id: dict[str, dict[str, Any]] = {}
    for question in questions.to_pylist():
        if question["split"] == split and question["error"] is None:
            questions_by_id[question["question_id"]] = question
    rows: list[dict[str, Any]] = []
    for row in demonstrations.to_pylist():
        question_id = row["question_id"]
        if row["error"] is not None or not row["solutions"] or question_id not in questions_by_id:
            continue
        question = questions_by_id[question_id]
        solutions = [solution["steps"] for solution in row["solutions"]]
        groups = [solutions] if share_prompts else [[steps] for steps in solutions]
        for group in groups:
            rows.append(
                {
                    "question_id": question_id,
                    "question": question_with_options(question["question"], question["options"]),
                    "answer_type": question["answer_type"],
                    "solutions": group,
                }
            )
    rows.sort(key=lambda row: str(row["question_id"]))
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def vocabulary_texts(worked: pa.Table, documents: Iterable[str]) -> list[str]:
    """The texts that the tokenizer of a model from scratch is made of: all that it, or a reward model, will read."""
    questions = worked["question"].to_pylist()
    solutions: list[str] = []
    for question_solutions in worked["solutions"].to_pylist():
        solutions += map(assistant_turn, question_solutions)
    # Every prompt holds these: as frequent in the vocabulary's texts as they are in use, a word becomes one token.
    frames = [POLICY_SYSTEM]
    for prompt_documents in ((), ("",)):
        frames += [message["content"] for message in prm_messages("", "", prompt_documents)]
    return [*questions, *solutions, *documents, *(frames * worked.num_rows), document_block([""] * 9)]


def train_policy(
    config: PolicyConfig, questions: pa.Table, demonstrations: pa.Table, documents: pa.Table, folder: str, name: str
) -> dict[str, float]:
    """Train the policy under Ray Train and leave its checkpoint in `folder`; gives `launch.figures`.

    Raises ValueError where no training question has a worked solution.
    """
    worked = worked_questions(
        questions,
        demonstrations,
        config.share_prompts,
    )
    if worked.num_rows == 0:
        raise ValueError(
            "train_policy: no question of the split 'train' has a worked solution in the table demonstrations. Choose "
            "a source that has them, or take a pretrained policy (models.policy=...), which leaves this step out."
        )
    texts = vocabulary_texts(worked, documents["text"].to_pylist()) if config.base is None else []
    tables = {"worked": worked, "texts": pa.table({"text": pa.array(sorted(texts), pa.string())})}
    return fit(PolicyStage, config, tables, {}, folder, name)


class PolicyStage(Stage):
    """Questions with worked solutions, and the model that learns to write them."""

    def __init__(
        self,
        config: PolicyConfig,
        inputs: dict[str, str],
        device: str,
    ) -> None:
        from medmm_ray.reward_model.attention import NAME

        self.config = config
        self.device = device
        self.micro_batch_budget = config.micro_batch_tokens
        if config.base is None:
            texts = read_input(inputs["texts"])["text"].to_pylist()
            self.model, self.tokenizer = new_llama(
                config.shape,
                texts,
                config.seed,
            )
        else:
            self.model, self.tokenizer = load_pretrained(config.base)
        self.model.set_attn_implementation(NAME)  # shared-prefix attention over packed rows
        if config.activation_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.adapter = LoraAdapter(self.model, config.lora) if config.lora else None
        self.module = self.model
        worked = read_input(inputs["worked"])
        self.encoded: list[EncodedQuestion] = []
        self.num_too_long = 0
        for row in worked.to_pylist():
            whole = self.encode_row(row)
            question = whole.within(config.max_length)
            self.encoded.append(question)
            self.num_too_long += len(whole.solutions) - len(question.solutions)
        self.units = self._units(worked["question_id"].to_pylist())

    def encode_row(self, row: Mapping[str, Any]) -> "EncodedQuestion":
        """A row of the input `worked` as token ids."""
        return encode(
            self.tokenizer,
            row["question"],
            row["answer_type"],
            row["solutions"],
        )

    def _units(self, names: Sequence[str]) -> Units:
        """What each worked solution costs."""
        count_flops = TrainingFlops(self.model)
        samples: list[list[int]] = []
        tokens: list[list[int]] = []
        flops: list[list[float]] = []
        for question in self.encoded:
            lengths = list(map(len, question.solutions))
            samples.append([1] * len(lengths))
            tokens.append(lengths)
            flops.append([count_flops.branch(len(question.prompt), length) for length in lengths])
        prompts = [len(question.prompt) for question in self.encoded]
        return Units.of(
            names,
            samples,
            tokens,
            flops,
            prompts,
            list(map(count_flops.prefix, prompts)),
        )

    def loss(self, parts: Sequence[Part], epoch: int) -> "torch.Tensor":
        """Sum over worked solutions of the mean cross-entropy of their tokens."""
        questions: list[EncodedQuestion] = []
        segments: list[Segment] = []
        for unit, places in parts:
            question = self.encoded[unit]
            name = f"{self.config.seed}/{epoch}/{unit}"
            segments.append(Segment(len(question.prompt), name))
            segments += [Segment(len(question.solutions[place]), f"{name}/{place}") for place in places]
            questions.append(EncodedQuestion(question.prompt, [question.solutions[place] for place in places]))
        if self.adapter:
            self.adapter.segments = segments
        return cross_entropy(self.model, questions, self.device)

    def figures(self, measured: Sequence[Any]) -> dict[str, float]:
        """The number of solutions that were left out; nothing is held out."""
        del measured
        return {"too_long": float(self.num_too_long)}

    def save(self, folder: Path, figures: Mapping[str, float]) -> None:  # noqa: ARG002
        """Write a Hugging Face checkpoint, an adapter merged in and beside it."""
        from medmm_ray.engines.pretrained import save

        if self.adapter:
            self.adapter.save_and_merge(folder)
        save(self.model, folder)
        self.tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class EncodedQuestion:
    """One question: the token ids of its prompt, and of each worked solution with its end-of-turn token."""

    prompt: list[int]
    solutions: list[list[int]]

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt once and of all solutions."""
        return len(self.prompt) + sum(map(len, self.solutions))

    @property
    def block(self) -> "Block":
        """Its place in a packed row; a lone solution continues its prompt."""
        from medmm_ray.reward_model.attention import Block

        if len(self.solutions) == 1:
            return Block(0, (self.num_tokens,))
        return Block(len(self.prompt), tuple(map(len, self.solutions)))

    def within(self, max_length: int) -> "EncodedQuestion":
        """The question without the solutions that do not fit behind the prompt."""
        room = max_length - len(self.prompt)
        return EncodedQuestion(self.prompt, [ids for ids in self.solutions if len(ids) <= room])


@dataclass(frozen=True)
class PackedRow:
    """Questions one after another for one forward pass, each its prompt, then its solutions.

    Token `target_N` is predicted at `source_N` and weighs `weight_N`.
    """

    blocks: "list[Block]"
    ids_L: "torch.Tensor"
    positions_L: "torch.Tensor"
    source_N: "torch.Tensor"
    target_N: "torch.Tensor"
    weight_N: "torch.Tensor"


def encode(
    tokenizer: Any,
    question: str,
    answer_type: str,
    solutions: Sequence[Sequence[str]],
) -> EncodedQuestion:
    """A question and its worked solutions as the ids that generation would meet."""
    messages = policy_messages(question, answer_type=answer_type)
    return encode_chat(
        tokenizer,
        messages,
        [assistant_turn(steps) for steps in solutions],
    )


def encode_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, str]],
    replies: Sequence[str],
) -> EncodedQuestion:
    """A chat and the replies to it, each with the token that ends a turn."""
    prompt = template_of(tokenizer).render(messages)
    # Each part by itself: generation continues the prompt's tokens, however its end and a reply would merge.
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    reply_ids: list[list[int]] = []
    for reply in replies:
        reply_ids.append(tokenizer(reply + tokenizer.eos_token, add_special_tokens=False)["input_ids"])
    return EncodedQuestion(prompt_ids, reply_ids)


def collate(questions: Sequence[EncodedQuestion]) -> PackedRow:
    """Questions as one row, each solution at the positions that follow its prompt."""
    import torch

    ids: list[int] = []
    positions: list[int] = []
    sources: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    for question in questions:
        prompt_length = len(question.prompt)
        last_of_prompt = len(ids) + prompt_length - 1
        ids += question.prompt
        positions += range(prompt_length)
        for solution in question.solutions:
            # The first token of each solution is predicted at the prompt's last one.
            sources += [last_of_prompt, *range(len(ids), len(ids) + len(solution) - 1)]
            targets += solution
            weights += [1 / len(solution)] * len(solution)
            ids += solution
            positions += range(prompt_length, prompt_length + len(solution))
    return PackedRow(
        blocks=[question.block for question in questions],
        ids_L=torch.tensor(ids),
        positions_L=torch.tensor(positions),
        source_N=torch.tensor(sources),
        target_N=torch.tensor(targets),
        weight_N=torch.tensor(weights),
    )


def cross_entropy(
    model: Any,
    questions: Sequence[EncodedQuestion],
    device: str,
) -> "torch.Tensor":
    """Sum over solutions of the mean cross-entropy of their tokens; the head runs on those alone.

    `model` takes packed rows: its attention is `reward_model.attention`'s.
    """
    import torch

    from medmm_ray.reward_model.attention import PackedRow

    row = collate(questions)
    hidden_1LD = model.base_model(
        input_ids=row.ids_L[None].to(device),
        position_ids=row.positions_L[None].to(device),
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),  # the row says who sees whom
        shared_prefix=PackedRow(row.blocks, device),
        use_cache=False,
    ).last_hidden_state
    # Prompts have no target: for them the vocabulary's logits, the largest tensor of the pass, are not computed.
    logits_NV = model.lm_head(hidden_1LD[0, row.source_N]).float()
    losses_N = torch.nn.functional.cross_entropy(
        logits_NV,
        row.target_N.to(device),
        reduction="none",
    )
    return (losses_N * row.weight_N.to(device)).sum()


def new_llama(
    shape: LlamaShape,
    texts: Sequence[str],
    seed: int,
) -> tuple[Any, Any]:
    """A Llama with random weights and a tokenizer made from `texts`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer(texts, shape.vocab_size)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(  # type: ignore[no-untyped-call]
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_heads,
            intermediate_size=shape.intermediate_size,
            max_position_embeddings=shape.max_length,
            tie_word_embeddings=shape.tie_embeddings,
            bos_token_id=None,  # its chat template writes none
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return model, tokenizer


def load_pretrained(name: str) -> tuple[Any, Any]:
    """A causal language model in float32 and its tokenizer.

    Raises `ConfigError` for a path that does not exist, `WeightsError` for files that are not whole or lack weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from medmm_ray.engines.pretrained import load, load_tokenizer

    path = resolve(name)
    tokenizer = load_tokenizer(path)
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer of {name} has no chat template; take an instruction-tuned checkpoint")
    return load(AutoModelForCausalLM, path, dtype=torch.float32), tokenizer
