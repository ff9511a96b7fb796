from medmm_ray.prompts import document_block, policy_messages, prm_messages


def test_prm_messages_are_byte_exact() -> None:
    system, user = prm_messages("Q (A) x", "Step 1: a ки", ["one", "two"])
    assert system["content"] == (
        "You are an evaluator assessing the logicality and validity of the reasoning in each step of the given "
        "explanation. In order to support the evaluation, the relevant documents, the question, and the explanation "
        "are provided sequentially. If the reasoning contains errors, output - after that step. If the reasoning in a "
        "step is logical and valid, output + after that step. "
    )
    assert user["content"] == "Document 1: one\n\nDocument 2: two\n\nQuestion: Q (A) x\n\nExplanation: Step 1: a ки"


def test_the_trailing_space_is_there_only_when_scoring_with_documents() -> None:
    assert prm_messages("q", "s", ["d"])[0]["content"].endswith("that step. ")
    assert prm_messages("q", "s", ["d"], training=True)[0]["content"].endswith("that step.")
    without = prm_messages("q", "s")[0]["content"]
    assert without.endswith("output + after that step.")
    assert "the question and the explanation are provided. If" in without


def test_policy_messages() -> None:
    system, user = policy_messages("Q (A) x", ["one"])
    assert system["role"] == "system"
    assert system["content"] == (
        "You are a medical expert. Reason step by step from the image and the clinical context. Start each step with "
        '"Step {number}:". End with "the answer is (option letter)."'
    )
    assert user["content"] == "Document 1: one\n\nQuestion: Q (A) x"
    assert policy_messages("Q", answer_type="open")[0]["content"] != system["content"]


def test_documents_that_bring_their_label_keep_it() -> None:
    assert document_block(["Document 1: a", "Document 4: b"]) == "Document 1: a\n\nDocument 4: b\n\n"
    assert document_block(["Document 1: a", "b"]) == "Document 1: Document 1: a\n\nDocument 2: b\n\n"
    assert document_block([]) == ""


def test_another_system_prompt_stands_in_its_place() -> None:
    assert prm_messages("q", "s", ["d"], system="Judge.")[0] == {"role": "system", "content": "Judge."}
