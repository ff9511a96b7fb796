"""Stage `policy`: supervised fine-tuning of a causal language model on worked solutions.

Enters: training questions and their worked solutions. Leaves: a Hugging Face checkpoint folder (safetensors, fast
tokenizer, generation config) that vLLM loads. Without a base model a small Llama starts from random weights, with a
tokenizer of its own made from the run's texts.

Legend: B samples, L tokens of the longest, N supervised tokens of all samples.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from medmm_ray.config import Config, execution
from medmm_ray.engines.checkpoints import resolve
from medmm_ray.engines.tokenizer import build_tokenizer
from medmm_ray.prompts import POLICY_SYSTEM, document_block, policy_messages, prm_messages
from medmm_ray.tables import filesystem
from medmm_ray.text import one_line, question_with_options
from medmm_ray.train.launch import fit
from medmm_ray.train.loop import Stage, TrainConfig

if TYPE_CHECKING:
    import torch

NOT_SUPERVISED = -100


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


class PolicyConfig(TrainConfig):
    """Supervised fine-tuning of the policy."""

    base: str | None = None
    """The checkpoint to start from: a folder, a URI, a hub id or package:<name>. null: a small Llama from scratch."""
    shape: LlamaShape = LlamaShape()
    """The small Llama, where there is no base."""
    learning_rate: float = 1e-3
    """Highest learning rate. 1e-3 suits a small model from scratch, 1e-5 a pretrained one."""
    epochs: int = 3
    """Times that every worked solution is seen."""
    batch_size: int = 32
    """Worked solutions of one update, over all workers."""
    max_length: int = 1024
    """Longest sample in tokens; a longer one is left out, never cut."""
    micro_batch_tokens: int = execution(8192)
    """Tokens (padding counts) of one forward pass of a worker."""


def assistant_turn(steps: Sequence[str]) -> str:
    """Steps as the policy writes them, one a line."""
    return "\n".join(f"Step {i}: {one_line(step)}" for i, step in enumerate(steps, 1))


def worked_samples(questions: pa.Table, demonstrations: pa.Table, split: str = "train") -> pa.Table:
    """One row a worked solution of a question of `split`: sample_id, question (with options), answer_type, steps."""
    by_id = {q["question_id"]: q for q in questions.to_pylist() if q["split"] == split and q["error"] is None}
    rows = [
        {
            "sample_id": solution["solution_id"],
            "question": question_with_options(question["question"], question["options"]),
            "answer_type": question["answer_type"],
            "steps": solution["steps"],
        }
        for row in demonstrations.to_pylist()
        if row["error"] is None and (question := by_id.get(row["question_id"]))
        for solution in row["solutions"]
    ]
    schema = pa.schema(
        {"sample_id": pa.string(), "question": pa.string(), "answer_type": pa.string(), "steps": pa.list_(pa.string())}
    )
    return pa.Table.from_pylist(sorted(rows, key=lambda r: r["sample_id"]), schema=schema)


def vocabulary_texts(samples: pa.Table, documents: Iterable[str]) -> list[str]:
    """What the tokenizer of a model from scratch is made of: every text that it, or a reward model, will read."""
    rows = samples.to_pylist()
    frames = [m["content"] for docs in ((), ("",)) for m in prm_messages("", "", docs)]
    return [
        *(row["question"] for row in rows),
        *(assistant_turn(row["steps"]) for row in rows),
        *documents,
        POLICY_SYSTEM,
        *frames,
        *(document_block([""] * 9),),
    ]


def train_policy(
    config: PolicyConfig, questions: pa.Table, demonstrations: pa.Table, documents: pa.Table, folder: str, name: str
) -> dict[str, float]:
    """Train the policy under Ray Train and leave its checkpoint in `folder`; gives `launch.figures`.

    Raises ValueError where no training question has a worked solution.
    """
    samples = worked_samples(questions, demonstrations)
    if samples.num_rows == 0:
        raise ValueError(
            "train_policy: no question of the split 'train' has a worked solution in the table demonstrations. Choose "
            "a source that has them, or take a pretrained policy (sample.model=...) and leave this step out."
        )
    texts = vocabulary_texts(samples, documents["text"].to_pylist()) if config.base is None else []
    tables = {"samples": samples, "texts": pa.table({"text": pa.array(sorted(set(texts)), pa.string())})}
    return fit(PolicyStage, config, tables, {}, folder, name)


class PolicyStage(Stage):
    """Worked solutions and the model that learns to write them. Figures: mean loss a supervised token of a sample."""

    padded = True

    def __init__(self, config: PolicyConfig, inputs: dict[str, str], device: str) -> None:
        self.device = device
        self.budget = config.micro_batch_tokens
        texts = read_parquet(inputs["texts"])["text"].to_pylist()
        self.model, self.tokenizer = (
            new_llama(config.shape, texts, config.seed) if config.base is None else pretrained(config.base)
        )
        self.module = self.model
        if config.activation_checkpointing:
            self.model.gradient_checkpointing_enable()
        rows = read_parquet(inputs["samples"]).to_pylist()
        encoded = [encode(self.tokenizer, row["question"], row["answer_type"], row["steps"]) for row in rows]
        kept = [i for i, (prompt, answer) in enumerate(encoded) if len(prompt) + len(answer) <= config.max_length]
        self.num_too_long = len(rows) - len(kept)
        self.encoded = [encoded[i] for i in kept]
        self.names = [rows[i]["sample_id"] for i in kept]
        self.sizes = [1] * len(kept)
        self.costs = [len(prompt) + len(answer) for prompt, answer in self.encoded]

    def loss(self, units: Sequence[int], epoch: int) -> "torch.Tensor":  # noqa: ARG002
        """Sum over samples of the mean cross-entropy of the solution's tokens; the head runs on those alone."""
        import torch

        ids_BL, labels_BL = pad([self.encoded[u] for u in units])
        hidden_BLD = self.model.model(input_ids=ids_BL.to(self.device)).last_hidden_state
        sample_N, position_N = (labels_BL[:, 1:] != NOT_SUPERVISED).nonzero(as_tuple=True)
        logits_NV = self.model.lm_head(hidden_BLD[sample_N, position_N]).float()
        losses_N = torch.nn.functional.cross_entropy(
            logits_NV, labels_BL[sample_N, position_N + 1].to(self.device), reduction="none"
        )
        counts_B = torch.bincount(sample_N, minlength=len(units))
        return (losses_N / counts_B[sample_N].to(self.device)).sum()

    def validate(self) -> dict[str, float]:
        return {"too_long": float(self.num_too_long)}

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def read_parquet(uri: str) -> pa.Table:
    fs, path = filesystem(uri)
    return pq.read_table(path, filesystem=fs)


def encode(tokenizer: Any, question: str, answer_type: str, steps: Sequence[str]) -> tuple[list[int], list[int]]:
    """Prompt ids and the solution's ids, its end-of-turn token included, as generation would meet them."""
    prompt = tokenizer.apply_chat_template(
        policy_messages(question, answer_type=answer_type), tokenize=False, add_generation_prompt=True
    )
    answer = assistant_turn(steps) + tokenizer.eos_token
    return (
        tokenizer(prompt, add_special_tokens=False)["input_ids"],
        tokenizer(answer, add_special_tokens=False)["input_ids"],
    )


def pad(samples: Sequence[tuple[list[int], list[int]]]) -> tuple["torch.Tensor", "torch.Tensor"]:
    """ids_BL and labels_BL (prompt and padding: NOT_SUPERVISED). Padding stands on the right, where a causal model
    does not see it: no mask is needed."""
    import torch

    longest = max(len(prompt) + len(answer) for prompt, answer in samples)
    ids_BL = torch.zeros(len(samples), longest, dtype=torch.long)
    labels_BL = torch.full((len(samples), longest), NOT_SUPERVISED)
    for row, (prompt, answer) in enumerate(samples):
        end = len(prompt) + len(answer)
        ids_BL[row, :end] = torch.tensor(prompt + answer)
        labels_BL[row, len(prompt) : end] = torch.tensor(answer)
    return ids_BL, labels_BL


def new_llama(shape: LlamaShape, texts: Sequence[str], seed: int) -> tuple[Any, Any]:
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
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return model, tokenizer


def pretrained(name: str) -> tuple[Any, Any]:
    """A causal language model in float32 and its tokenizer; raises `ConfigError` for a path that does not exist."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = resolve(name)
    tokenizer = AutoTokenizer.from_pretrained(path)
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer of {name} has no chat template; take an instruction-tuned checkpoint")
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), tokenizer
