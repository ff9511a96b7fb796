"""Bodies for the OpenAPI page, one for each shape of each path; a test sends every one of them."""

from typing import Any

CASE: dict[str, Any] = {
    "question": "What does the chest radiograph show?",
    "options": ["No finding", "Right pleural effusion", "Left pleural effusion", "Cardiomegaly"],
    "documents": ["A pleural effusion blunts the costophrenic angle on its side."],
}
MARKED = "Step 1: The left costophrenic angle is blunted. Step 2: So the answer is (C)."
LISTED = ["The right costophrenic angle is blunted.", "So the answer is (B)."]
# 16 x 16 grey pixels, brighter at the lower left.
IMAGE = (
    "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAAAAAA6mKC9AAAAHElEQVR42mPUYEAFTAyDVIDxBAMDAwND"
    "Am1tAQCuigFvUwbcJgAAAABJRU5ErkJggg=="
)
QUERY = "Which side is the effusion on? (A) none (B) right (C) left"

RERANK = {
    "steps": {
        "summary": "A question with documents and two solutions",
        "value": {**CASE, "solutions": [MARKED, LISTED], "aggregate": "min"},
    },
    "cohere": {
        "summary": "Cohere's and Jina's body: the documents are candidate solutions",
        "value": {"query": QUERY, "documents": [MARKED, {"text": "The answer is (B)."}], "top_n": 1},
    },
}
SCORE = {
    "steps": {
        "summary": "The probabilities of the steps of two solutions",
        "value": {**CASE, "solutions": [MARKED, LISTED]},
    },
    "vllm": {
        "summary": "vLLM's body: one question, two solutions",
        "value": {"text_1": QUERY, "text_2": [MARKED, "The answer is (B)."]},
    },
}
REWARDS = {
    "completions": {
        "summary": "Two completions of one prompt, answers checked, long ones punished",
        "value": {
            "prompts": [{**CASE, "completions": [MARKED, LISTED], "gold": "C"}],
            "terms": {"temperature": 0.1, "answer_weight": 1.0, "max_characters": 2000, "margin_characters": 500},
        },
    },
    "openrlhf": {
        "summary": "OpenRLHF's body: prompts with their completions",
        "value": {"query": [f"{QUERY}\n{MARKED}<|im_end|>"], "prompts": [f"{QUERY}\n"], "labels": ["C"]},
    },
}
BEST_OF_N = {
    "rounds": {
        "summary": "At most 16 samples, fewer where the answer is sure to stay",
        "value": {**CASE, "num_samples": 16, "round_size": 4, "reliability": 0.9, "rule": "sc_rm"},
    },
    "stream": {
        "summary": "The same as server-sent events",
        "value": {**CASE, "num_samples": 16, "stream": True},
    },
}
TILE_MAPS = {
    "image": {
        "summary": "Where in an image the steps of a solution come from",
        "value": {**CASE, "image": IMAGE, "solutions": [MARKED]},
    },
}
