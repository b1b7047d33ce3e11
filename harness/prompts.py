"""From a sample to the text that a model is trained on: the columns that data sets use, and the prompt formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from estimator.errors import InputError

PROMPT_FORMATS = ("chat", "alpaca", "plain")
COLUMNS = "text; messages; instruction (input) output; prompt completion; question answer"
"""What a sample may consist of, as errors say it."""

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{question}\n\n### Response:\n{answer}"
)
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{question}\n\n### Input:\n{context}\n\n### Response:\n{answer}"
)
_PAIRS = (("instruction", "output"), ("prompt", "completion"), ("question", "answer"))
_SPEAKERS = {"user": "Human", "human": "Human", "assistant": "Assistant", "gpt": "Assistant", "system": "System"}


def document(sample: Mapping[str, Any], prompt_format: str) -> str:
    """The text of one sample.

    ``chat`` is that of openassistant-guanaco ("### Human: ...### Assistant: ..."), ``alpaca`` that of Stanford's Alpaca,
    ``plain`` question and answer with a blank line between. A sample with ``text`` is taken as it stands, in any format.
    Raises InputError for a sample without a known column or with a value that is not text; the caller says where it is.
    """
    if prompt_format not in PROMPT_FORMATS:
        raise InputError(
            f"prompt_format: {prompt_format!r} is not known; write --prompt-format with one of {', '.join(PROMPT_FORMATS)}"
        )
    if sample.get("messages") is not None:
        return _conversation(sample["messages"], prompt_format)
    if sample.get("text") is not None:
        return _text(sample, "text")
    for question, answer in _PAIRS:
        if sample.get(question) is not None and sample.get(answer) is not None:
            context = _text(sample, "input") if question == "instruction" and sample.get("input") else ""
            return _turn(_text(sample, question), context, _text(sample, answer), prompt_format)
    found = ", ".join(map(str, sample)) or "nothing"
    raise InputError(f"no known columns among {found}; a sample has one of: {COLUMNS}")


def _text(sample: Mapping[str, Any], column: str) -> str:
    value = sample[column]
    if not isinstance(value, str):
        raise InputError(f"{column} is not text but {str(value)[:40]!r}")
    return value


def _turn(question: str, context: str, answer: str, prompt_format: str) -> str:
    if prompt_format == "alpaca":
        template = _ALPACA_INPUT if context else _ALPACA
        return template.format(question=question, context=context, answer=answer)
    asked = f"{question}\n{context}" if context else question
    return f"### Human: {asked}### Assistant: {answer}" if prompt_format == "chat" else f"{asked}\n\n{answer}"


def _conversation(messages: Any, prompt_format: str) -> str:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InputError("messages is not a list of {role, content}")
    turns: list[tuple[str, str]] = []
    for message in messages:
        role = message.get("role") if isinstance(message, Mapping) else None
        if not isinstance(message, Mapping) or role not in _SPEAKERS or not isinstance(message.get("content"), str):
            raise InputError("messages holds something else than {role: user|assistant|system, content: text}")
        turns.append((_SPEAKERS[role], message["content"]))
    if prompt_format == "plain":
        return "\n\n".join(content for _, content in turns)
    if prompt_format == "chat":
        return "".join(f"### {speaker}: {content}" for speaker, content in turns)
    heads = {"Human": "### Instruction:", "Assistant": "### Response:", "System": "### System:"}
    return "\n\n".join(f"{heads[speaker]}\n{content}" for speaker, content in turns)
