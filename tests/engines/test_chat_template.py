"""engines/chat_template.py: the same bytes on any day, no instruction lost, no step tag lost, what is altered known."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from medmm_ray.engines.chat import Chat, ChatError, ChatPrompt
from medmm_ray.engines.chat_template import ChatTemplate, TemplateUse, folded
from medmm_ray.reward_model import CheckpointError, RewardModel
from tests.doubles import tiny_reward_model as tiny
from tests.doubles.tiny_reward_model import QUESTION
from tests.reward_model import medprm_reference

GEMMA = (  # has no system role, trims
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}<|end|>\n{% endfor %}<|assistant|>\n"
)
SILENT = "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
TURNS = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content OPEN }}<|end|>\n{% endfor %}<|assistant|>\n"
DATED = "Today: {{ strftime_now('%d %b %Y') }}\n" + TURNS.replace(" OPEN", "")
LLAMA_3_1 = (
    "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}Today: {{ date_string }}\n"
)
LLAMA_3_2 = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}"
    "{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}"
    "Today: {{ date_string }}\n"
)
STEPS = ["Left  lung.", "The answer is (A)."]


def folder_with(folder: Path, template: str) -> Path:
    fast = tiny.tokenizer()
    fast.chat_template = template
    return tiny.save(folder, fast=fast)


def text_of(model: RewardModel, solution: Any) -> str:
    (group,) = model.pack(QUESTION, [solution]).groups
    return str(model.tokenizer.decode(group.prefix_ids + group.branches[0].ids))


class Days(datetime.datetime):
    """A clock that is set; transformers' templates ask it for now."""

    today_is = datetime.datetime(2024, 7, 26)

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return cls.today_is


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> type[Days]:
    from transformers.utils import chat_template_utils

    monkeypatch.setattr(chat_template_utils, "datetime", Days)
    return Days


@pytest.mark.parametrize(
    "template", [DATED, LLAMA_3_1 + TURNS.replace(" OPEN", ""), LLAMA_3_2 + TURNS.replace(" OPEN", "")]
)
def test_a_template_that_writes_the_date_scores_the_same_tomorrow(
    tmp_path: Path, template: str, clock: type[Days], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_with(tmp_path / "made", template)
    first = RewardModel.from_pretrained(folder)
    scores = first.score(QUESTION, [STEPS])
    first.save_pretrained(tmp_path / "saved")
    assert text_of(first, STEPS).removeprefix("<|bos|>").startswith("Today: 26 Jul 2024\n")
    prompt = ChatPrompt([{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}])
    asked = Chat(str(folder)).token_ids(prompt)
    monkeypatch.setattr(clock, "today_is", datetime.datetime(2031, 12, 24))
    assert first.score(QUESTION, [STEPS]) == scores
    assert RewardModel.from_pretrained(folder).score(QUESTION, [STEPS]) == scores
    assert RewardModel.from_pretrained(tmp_path / "saved").score(QUESTION, [STEPS]) == scores
    assert Chat(str(folder)).token_ids(prompt) == asked
    said = json.loads((tmp_path / "saved" / "reward_model.json").read_text())["template"]
    assert said == {
        "date": None if template.startswith(LLAMA_3_1) else "2024-07-26",
        "folds_system": False,
        "alters": [],
    }


def test_the_date_is_the_checkpoints(tmp_path: Path) -> None:
    RewardModel.from_pretrained(folder_with(tmp_path / "made", DATED)).save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "reward_model.json"
    file.write_text(file.read_text().replace("2024-07-26", "2025-01-02"))
    back = RewardModel.from_pretrained(tmp_path / "saved")
    assert text_of(back, STEPS).removeprefix("<|bos|>").startswith("Today: 02 Jan 2025\n")


@pytest.mark.parametrize(("template", "alters"), [(GEMMA, ("outer white space",)), (SILENT, ())])
def test_an_instruction_without_a_place_begins_the_users_turn(
    tmp_path: Path, template: str, alters: tuple[str, ...]
) -> None:
    model = RewardModel.from_pretrained(folder_with(tmp_path / "made", template))
    assert model.family.template is not None
    assert model.family.template.use == TemplateUse(None, True, alters)
    user = (
        f"{medprm_reference.SYSTEM_WITHOUT_DOCUMENTS}\n\nQuestion: {QUESTION}\n\nExplanation: "
        "Step 1: Left  lung. ки Step 2: The answer is (A). ки"
    )
    assert text_of(model, STEPS) == f"<|bos|><|user|>\n{user}"
    expected = medprm_reference.probs_at_tags(
        model.text_model, model.tokenizer, model.tokenizer(f"<|user|>\n{user}")["input_ids"]
    )
    model.save_pretrained(tmp_path / "saved")
    for one in (model, RewardModel.from_pretrained(tmp_path / "saved")):
        assert one.score(QUESTION, [STEPS])[0].plus_probs == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("filter_", "alters", "own"),
    [
        ("| trim", ["outer white space"], "Step 1: Left  lung. ки Step 2: So. ки"),
        ("| lower", ["letter case"], "step 1: left  lung. ки step 2: so. ки"),
        ("| replace('  ', ' ')", ["outer white space", "runs of white space"], "Step 1: Left lung. ки Step 2: So. ки"),
        ("| escape", ["other characters"], "Step 1: Left  lung. ки Step 2: So. ки"),
    ],
)
def test_what_a_template_alters_is_noted_and_read_through_it(
    tmp_path: Path, filter_: str, alters: list[str], own: str
) -> None:
    folder = folder_with(tmp_path / "made", TURNS.replace("OPEN", filter_))
    model = RewardModel.from_pretrained(folder)
    solution = ["Left  lung.", "So."]
    assert text_of(model, solution).endswith(own)
    expected = medprm_reference.probs(
        model.text_model, model.tokenizer, QUESTION, "Step 1: Left  lung. ки Step 2: So. ки"
    )  # through the same template
    (found,) = model.score(QUESTION, [solution])
    assert found.plus_probs == pytest.approx(expected, abs=1e-5)
    assert model.text_states(QUESTION, [solution])[0].summaries_TD.isfinite().all()
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "reward_model.json").read_text())["template"]["alters"] == alters
    assert RewardModel.from_pretrained(tmp_path / "saved").score(QUESTION, [solution]) == [found]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            TURNS.replace("OPEN", "| upper"),
            "alters the solution's text: of 3 steps, each ended by ' ки', 0 tags are left",
        ),
        (TURNS.replace("OPEN", "| replace('ки', '')"), "alters the solution's text"),
        (TURNS.replace(" OPEN", "[:200]"), "alters the solution's text"),
        (TURNS.replace(" OPEN", "[::-1]"), "leaves the user's text out"),
        ("{% for m in messages %}<|{{ m.role }}|>{% endfor %}", "leaves the user's text out"),
        ("{{ raise_exception('Tools only') }}", "renders no chat of one user's turn: Tools only"),
    ],
)
def test_a_template_that_makes_steps_unreadable_is_refused_at_load(tmp_path: Path, template: str, words: str) -> None:
    folder = folder_with(tmp_path / "made", template)
    with pytest.raises(CheckpointError) as error:
        RewardModel.from_pretrained(folder)
    assert words in str(error.value)
    assert "tokenizer.chat_template" in str(error.value)


def test_a_template_that_was_changed_behind_the_checkpoint_is_refused(tmp_path: Path) -> None:
    RewardModel.from_pretrained(folder_with(tmp_path / "made", TURNS.replace(" OPEN", ""))).save_pretrained(
        tmp_path / "saved"
    )
    (tmp_path / "saved" / "chat_template.jinja").write_text(GEMMA)
    with pytest.raises(CheckpointError, match="its chat template is now used as"):
        RewardModel.from_pretrained(tmp_path / "saved")


def test_a_checkpoint_from_before_templates_were_recorded_is_read(tmp_path: Path) -> None:
    RewardModel.from_pretrained(folder_with(tmp_path / "made", GEMMA)).save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "reward_model.json"
    said = json.loads(file.read_text())
    del said["template"], said["system_prompt"]
    file.write_text(json.dumps(said))
    model = RewardModel.from_pretrained(tmp_path / "saved")
    assert model.family.template is not None
    assert model.family.template.use.folds_system


def test_a_policy_is_asked_without_a_system_role_or_refused(tmp_path: Path) -> None:
    chat = Chat(str(folder_with(tmp_path / "gemma", GEMMA)))
    ids = chat.token_ids(
        ChatPrompt([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which?"}])
    )
    assert chat.tokenizer.decode(ids) == "<|user|>\nBe brief.\n\nWhich?<|end|>\n<|assistant|>"
    with pytest.raises(ChatError, match=r"cannot be asked as a policy: .*leaves the user's text out"):
        Chat(str(folder_with(tmp_path / "lost", "<|user|>")))


def test_contents_in_parts_are_folded_into_the_first_text() -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "Which?"}, {"type": "text", "text": "Now."}]
    chat = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, {"role": "user", "content": parts}]
    assert folded(chat) == [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "Be brief.\n\nWhich?"}, parts[2]],
        }
    ]
    assert folded(chat[1:]) == chat[1:]
    assert parts[1] == {"type": "text", "text": "Which?"}


def test_only_variables_that_the_template_reads_are_given() -> None:
    seen: list[dict[str, Any]] = []

    def apply(messages: Any, **options: Any) -> str:
        seen.append(options)
        now = options.get("strftime_now")
        return f"{now('%Y') if now else ''} {messages[-1]['content']} {messages[0]['content']}"

    ChatTemplate(apply, "{{ strftime_now('%Y') }}").render([{"role": "user", "content": "Which?"}])
    assert set(seen[-1]) == {"tokenize", "add_generation_prompt", "strftime_now"}
