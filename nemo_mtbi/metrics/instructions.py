# SPDX-License-Identifier: Apache-2.0
"""Rule-checked instruction following, in the sense of IFEval (arXiv 2311.07911).

A rule is a mapping: ``{"rule": "bullets", "count": 3}``. ``strict`` looks at the answer as it is, ``loose`` also at it
without its first line, its last line, both, and without asterisks, and takes the kindest reading. What differs from
IFEval: keywords are texts and not regular expressions, sentences are counted without NLTK, and the language of an
answer is not looked at (``language:response_language`` can't be checked; the two ``change_case`` rules ask for case
alone).
"""

import inspect
import json
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

_RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "exactly": operator.eq,
    "at least": operator.ge,
    "at most": operator.le,
    "less than": operator.lt,
    "more than": operator.gt,
}
_FENCE = re.compile(r"\A```(?:json|Json|JSON)?|```\Z")
# A mark at the end of a word ends a sentence, but for the point of a title, of a Latin abbreviation or an initial.
_NO_END = "".join(
    rf"(?<!\b{word})" for word in ("Mr", "Mrs", "Ms", "Dr", "Prof", "St", "vs", r"e\.g", r"i\.e", "[A-Z]")
)
_SENTENCE_END = re.compile(rf"(?:{_NO_END}\.|[!?…])[.!?…]*[\"'”’)\]*]*(?=\s|$)|[。！？]+")
_POSTSCRIPTS = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
_OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def _upper(answer: str) -> bool:
    return answer.isupper()


def _lower(answer: str) -> bool:
    return answer.islower()


def _quoted(answer: str) -> bool:
    answer = answer.strip()
    return len(answer) > 1 and answer[0] == answer[-1] == '"'


def _json(answer: str) -> bool:
    try:
        json.loads(_FENCE.sub("", answer.strip()))
    except (ValueError, RecursionError):
        return False
    return True


def _bullets(answer: str, count: int, relation: str = "exactly") -> bool:
    stars = re.findall(r"^\s*\*[^\*].*$", answer, flags=re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", answer, flags=re.MULTILINE)
    return _RELATIONS[relation](len(stars) + len(dashes), count)


def _words(answer: str, count: int, relation: str = "at least") -> bool:
    return _RELATIONS[relation](len(re.findall(r"\w+", answer)), count)


def _sentences(answer: str, count: int, relation: str = "at least") -> bool:
    return _RELATIONS[relation](count_sentences(answer), count)


def _paragraphs(answer: str, count: int, relation: str = "exactly", divider: str = "***") -> bool:
    parts = [part.strip() for part in answer.split(divider)]
    if not all(parts[1:-1]):
        return False  # an empty one in the middle
    return _RELATIONS[relation](sum(map(bool, parts)), count)


def _nth_paragraph(answer: str, count: int, nth: int, word: str) -> bool:
    paragraphs = answer.split("\n\n")
    written = sum(bool(paragraph.strip()) for paragraph in paragraphs)
    if written != count or not 1 <= nth <= written:
        return False
    first = [*paragraphs[nth - 1].split(), ""][0].lstrip("'").lstrip('"')
    return re.split(r"[.,?!'\"]", first)[0].lower() == word.lower()


def _starts_with(answer: str, phrase: str) -> bool:
    return answer.strip().lower().startswith(phrase.strip().lower())


def _ends_with(answer: str, phrase: str) -> bool:
    return answer.strip().strip('"').lower().endswith(phrase.strip().lower())


def _contains(answer: str, keywords: Sequence[str]) -> bool:
    return all(keyword.lower() in answer.lower() for keyword in keywords)


def _excludes(answer: str, words: Sequence[str]) -> bool:
    return not any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", answer, flags=re.IGNORECASE) for word in words)


def _keyword_count(answer: str, keyword: str, count: int, relation: str = "at least") -> bool:
    return _RELATIONS[relation](answer.lower().count(keyword.strip().lower()), count)


def _letter_count(answer: str, letter: str, count: int, relation: str = "at least") -> bool:
    return _RELATIONS[relation](answer.lower().count(letter.lower()), count)


def _capital_words(answer: str, count: int, relation: str = "at least") -> bool:
    return _RELATIONS[relation](sum(w.isupper() for w in re.findall(r"\w+(?:[-'’.]\w+)*", answer)), count)


def _no_comma(answer: str) -> bool:
    return "," not in answer


def _title(answer: str) -> bool:
    return any(match.strip("<>").strip() for match in re.findall(r"<<[^\n]+>>", answer))


def _placeholders(answer: str, count: int) -> bool:
    return len(re.findall(r"\[.*?\]", answer)) >= count


def _highlights(answer: str, count: int) -> bool:
    single = [match.strip("*") for match in re.findall(r"\*[^\n*]*\*", answer)]
    double = [match[2:-2] for match in re.findall(r"\*\*[^\n*]*\*\*", answer)]
    return sum(bool(text.strip()) for text in single + double) >= count


def _sections(answer: str, marker: str, count: int) -> bool:
    return len(re.findall(rf"{re.escape(marker.strip())}\s?\d+", answer)) >= count


def _postscript(answer: str, marker: str) -> bool:
    marker = marker.strip()
    return re.search(_POSTSCRIPTS.get(marker, re.escape(marker.lower())), answer.lower()) is not None


def _one_of(answer: str, options: Sequence[str] = _OPTIONS) -> bool:
    return any(option in answer for option in options)


def _two_responses(answer: str) -> bool:
    parts = [part.strip() for part in answer.split("******")]
    written = [part for part in parts if part]
    return all(parts[1:-1]) and len(written) == 2 and written[0] != written[1]


RULES: dict[str, Callable[..., bool]] = {
    "upper": _upper,
    "lower": _lower,
    "quoted": _quoted,
    "json": _json,
    "bullets": _bullets,
    "words": _words,
    "sentences": _sentences,
    "paragraphs": _paragraphs,
    "nth_paragraph": _nth_paragraph,
    "starts_with": _starts_with,
    "ends_with": _ends_with,
    "contains": _contains,
    "excludes": _excludes,
    "keyword_count": _keyword_count,
    "letter_count": _letter_count,
    "capital_words": _capital_words,
    "no_comma": _no_comma,
    "title": _title,
    "placeholders": _placeholders,
    "highlights": _highlights,
    "sections": _sections,
    "postscript": _postscript,
    "one_of": _one_of,
    "two_responses": _two_responses,
}

# IFEval's instruction to our rule, and its names of the parameters to ours.
_IFEVAL: dict[str, tuple[str, dict[str, str]]] = {
    "change_case:capital_word_frequency": (
        "capital_words",
        {"capital_frequency": "count", "capital_relation": "relation"},
    ),
    "change_case:english_capital": ("upper", {}),
    "change_case:english_lowercase": ("lower", {}),
    "combination:repeat_prompt": ("starts_with", {"prompt_to_repeat": "phrase"}),
    "combination:two_responses": ("two_responses", {}),
    "detectable_content:number_placeholders": ("placeholders", {"num_placeholders": "count"}),
    "detectable_content:postscript": ("postscript", {"postscript_marker": "marker"}),
    "detectable_format:constrained_response": ("one_of", {}),
    "detectable_format:json_format": ("json", {}),
    "detectable_format:multiple_sections": ("sections", {"section_spliter": "marker", "num_sections": "count"}),
    "detectable_format:number_bullet_lists": ("bullets", {"num_bullets": "count"}),
    "detectable_format:number_highlighted_sections": ("highlights", {"num_highlights": "count"}),
    "detectable_format:title": ("title", {}),
    "keywords:existence": ("contains", {"keywords": "keywords"}),
    "keywords:forbidden_words": ("excludes", {"forbidden_words": "words"}),
    "keywords:frequency": ("keyword_count", {"keyword": "keyword", "frequency": "count", "relation": "relation"}),
    "keywords:letter_frequency": (
        "letter_count",
        {"letter": "letter", "let_frequency": "count", "let_relation": "relation"},
    ),
    "length_constraints:nth_paragraph_first_word": (
        "nth_paragraph",
        {"num_paragraphs": "count", "nth_paragraph": "nth", "first_word": "word"},
    ),
    "length_constraints:number_paragraphs": ("paragraphs", {"num_paragraphs": "count"}),
    "length_constraints:number_sentences": ("sentences", {"num_sentences": "count", "relation": "relation"}),
    "length_constraints:number_words": ("words", {"num_words": "count", "relation": "relation"}),
    "punctuation:no_comma": ("no_comma", {}),
    "startend:end_checker": ("ends_with", {"end_phrase": "phrase"}),
    "startend:quotation": ("quoted", {}),
}


def count_sentences(text: str) -> int:
    """Return how many sentences a text has: pieces with a letter or digit, cut at ``.``, ``!``, ``?`` and ``…``.

    The point of an initial or of a title ("Dr.") cuts nothing, nor does one within a number.
    """
    return sum(re.search(r"\w", piece) is not None for piece in _SENTENCE_END.split(text))


def from_ifeval(instruction_ids: Sequence[str], kwargs: Sequence[Mapping[str, Any] | None]) -> list[dict[str, Any]]:
    """Return the rules of an item in IFEval's form (``instruction_id_list`` and ``kwargs``).

    Parameters that are None are left out, as in the public files that list every name for every instruction.

    Raises:
        ValueError: the lists differ in length, an instruction can't be checked here or its parameters are wrong.
    """
    if len(instruction_ids) != len(kwargs):
        raise ValueError(f"{len(instruction_ids)} instructions but {len(kwargs)} sets of parameters: pass one each")
    rules = []
    for name, given in zip(instruction_ids, kwargs, strict=True):
        if name not in _IFEVAL:
            raise ValueError(f"instruction {name!r} can't be checked by rule here; leave the item out and count it")
        rule, names = _IFEVAL[name]
        given = {key: value for key, value in (given or {}).items() if value is not None}
        unknown = sorted(set(given) - set(names))
        if unknown:
            raise ValueError(f"instruction {name!r} has no parameter {', '.join(unknown)}; use {', '.join(names)}")
        rules.append({"rule": rule, **{names[key]: value for key, value in given.items()}})
    check_rules(rules)
    return rules


def check_rules(rules: Any) -> None:
    """Raise ValueError unless the argument is a list of at least one rule, each known and with right parameters."""
    if not isinstance(rules, (list, tuple)) or not rules:
        raise ValueError(f"the reference must be a list of rules such as {{'rule': 'upper'}}, got {rules!r}")
    for rule in rules:
        named = isinstance(rule, Mapping) and isinstance(rule.get("rule"), str)
        if not named or rule["rule"] not in RULES:
            raise ValueError(f"unknown rule {rule!r}: 'rule' must be one of {', '.join(RULES)}")
        name, parameters = rule["rule"], {key: value for key, value in rule.items() if key != "rule"}
        signature = inspect.signature(RULES[name])
        try:
            signature.bind("", **parameters)
        except TypeError as error:
            known = ", ".join(list(signature.parameters)[1:]) or "none"
            raise ValueError(f"rule {name!r}: {error}; its parameters are: {known}") from error
        for key, value in parameters.items():
            _check_parameter(name, key, value)


def follows(answer: str, rule: Mapping[str, Any], loose: bool = False) -> bool:
    """Return whether the answer obeys a rule (which :func:`check_rules` accepts); an empty one obeys none."""
    parameters = {key: value for key, value in rule.items() if key != "rule"}
    readings = loose_readings(answer) if loose else [answer]
    return any(reading.strip() and RULES[rule["rule"]](reading, **parameters) for reading in readings)


def loose_readings(answer: str) -> list[str]:
    """Return IFEval's eight readings: whole, without first line, last line, both; each with and without asterisks."""
    lines = answer.split("\n")
    cut = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    return [reading for text in (answer, *cut) for reading in (text, text.replace("*", ""))]


def follow_rows(
    references: Sequence[Sequence[Mapping[str, Any]]],
    answers: Sequence[str],
    abstained: np.ndarray,
    *,
    loose: bool,
    whole: bool,
) -> np.ndarray:
    """Return ``[items, 2]``: rules obeyed and rules given; with ``whole``, whether all are obeyed, and 1."""
    rows = []
    for rules, answer, silent in zip(references, answers, abstained, strict=True):
        obeyed = [not silent and follows(answer, rule, loose) for rule in rules]
        rows.append([all(obeyed), 1] if whole else [sum(obeyed), len(obeyed)])
    return np.array(rows, dtype=np.float64)


def _check_parameter(rule: str, name: str, value: Any) -> None:
    if name in ("count", "nth"):
        good, wanted = type(value) is int and value >= 0, "a whole number ≥ 0"
    elif name == "relation":
        good, wanted = isinstance(value, str) and value in _RELATIONS, f"one of {', '.join(_RELATIONS)}"
    elif name in ("keywords", "words", "options"):
        several = isinstance(value, (list, tuple)) and len(value) > 0
        good, wanted = several and all(isinstance(v, str) and v for v in value), "a list of texts"
    elif name == "letter":
        good, wanted = isinstance(value, str) and len(value) == 1, "one character"
    else:
        good = isinstance(value, str) and bool(value if name == "divider" else value.strip())
        wanted = "a text"
    if not good:
        raise ValueError(f"rule {rule!r}: {name} must be {wanted}, got {value!r}")
