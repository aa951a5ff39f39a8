"""How much of what was asked for is in what was written."""

import re

CONTROL = re.compile(r"[\x00-\x1f]")


def share_found(text: str, answers: list[str]) -> float:
    """The share of ``answers`` that ``text`` holds, whatever the case: the score of every task in lm-evaluation-harness."""
    return sum(_found(text, answers)) / len(answers)


def any_found(text: str, answers: list[str]) -> float:
    """1.0 where ``text`` holds one of ``answers`` at least: RULER's own score of question answering, whose answers say the same."""
    return float(any(_found(text, answers)))


def _found(text: str, answers: list[str]) -> list[bool]:
    text = CONTROL.sub("\n", text.strip()).strip().lower()
    return [answer.lower() in text for answer in answers]
