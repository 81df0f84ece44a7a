# SPDX-License-Identifier: Apache-2.0
"""The small English world of the embedded demo: sentences, their glossary, and the right answer of each demo task.

A sentence is drawn from a form, a fixed sequence of word categories; every word belongs to one category, so the
slots can be read back from the words and every answer can be computed from a transcript alone. All answers are made of
words copied from the sentence, words looked up for one of its words, and fixed words, so a very small LLM can learn
them.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUMBER_WORDS = (*DIGITS, "ten", "eleven", "twelve", "thirteen", "fourteen")
HAPPY_MOODS = ("happy", "calm", "brave", "proud")
SAD_MOODS = ("sad", "angry", "tired", "lonely")
WATER_PLACES = ("river", "lake", "beach", "harbor", "island", "ocean", "pond", "waterfall", "swamp")
LAND_PLACES = ("forest", "mountain", "school", "market", "castle", "garden", "tower")

# Category -> {spoken word: Spanish word}. A word stands in one category only. No homophone of a digit ("to", "for",
# "ate", "won") is ever spoken, so a transcript is decided by its sound.
_GLOSSARY: dict[str, dict[str, str]] = {
    "det": {"the": "el", "my": "mi", "this": "este", "every": "cada"},
    "animal": {
        "fox": "zorro", "dog": "perro", "rabbit": "conejo", "horse": "caballo", "cow": "vaca", "sheep": "oveja",
        "mouse": "raton", "wolf": "lobo", "bear": "oso", "goat": "cabra", "lion": "leon", "tiger": "tigre",
        "monkey": "mono", "snake": "serpiente", "turtle": "tortuga", "eagle": "aguila", "duck": "pato",
        "lizard": "lagarto", "zebra": "cebra", "penguin": "pinguino", "spider": "arana", "chicken": "gallina",
    },
    "verb": {
        "jumps": "salta", "runs": "corre", "walks": "camina", "sleeps": "duerme", "sings": "canta",
        "hides": "esconde", "plays": "juega", "swims": "nada", "climbs": "trepa", "dances": "baila",
        "shouts": "grita", "drinks": "bebe", "rests": "descansa", "looks": "mira",
    },
    "move": {"waits": "espera", "stops": "para", "turns": "gira", "leaves": "sale"},
    "take": {
        "finds": "encuentra", "carries": "lleva", "paints": "pinta", "holds": "sostiene", "brings": "trae",
        "loses": "pierde",
    },
    "object": {
        "key": "llave", "ball": "pelota", "blanket": "manta", "lamp": "lampara", "letter": "carta", "basket": "cesta",
        "bottle": "botella", "hat": "sombrero", "umbrella": "paraguas", "pencil": "lapiz", "drum": "tambor",
        "mirror": "espejo",
    },
    "prep": {
        "near": "cerca", "behind": "detras", "under": "bajo", "above": "sobre", "around": "alrededor",
        "inside": "dentro",
    },
    "place": {
        "river": "rio", "lake": "lago", "beach": "playa", "harbor": "puerto", "island": "isla", "ocean": "oceano",
        "pond": "estanque", "waterfall": "cascada", "swamp": "pantano", "forest": "bosque", "mountain": "montana",
        "school": "escuela", "market": "mercado", "castle": "castillo", "garden": "jardin", "tower": "torre",
    },
    "time": {
        "today": "hoy", "tonight": "noche", "tomorrow": "manana", "yesterday": "ayer", "monday": "lunes",
        "friday": "viernes",
    },
    "adverb": {
        "slowly": "lentamente", "quickly": "rapidamente", "quietly": "silenciosamente", "gently": "suavemente",
        "suddenly": "subitamente", "loudly": "ruidosamente", "carefully": "cuidadosamente", "lazily": "perezosamente",
    },
    "size": {"small": "pequeno", "tiny": "diminuto", "big": "grande", "huge": "enorme"},
    "mood": {
        "happy": "feliz", "calm": "tranquilo", "brave": "valiente", "proud": "orgulloso", "sad": "triste",
        "angry": "enojado", "tired": "cansado", "lonely": "solitario",
    },
    "color": {
        "red": "rojo", "blue": "azul", "green": "verde", "black": "negro", "white": "blanco", "yellow": "amarillo",
        "purple": "morado", "brown": "marron",
    },
    "vehicle": {"bus": "autobus", "train": "tren", "bicycle": "bicicleta", "truck": "camion"},
    "mark": {"window": "ventana", "room": "cuarto", "platform": "anden", "table": "mesa"},
    "number": dict(
        zip(DIGITS, ("cero", "uno", "dos", "tres", "cuatro", "cinco", "seis", "siete", "ocho", "nueve"), strict=True)
    ),
}  # fmt: skip
CATEGORIES: dict[str, tuple[str, ...]] = {category: tuple(entries) for category, entries in _GLOSSARY.items()}
SPANISH: dict[str, str] = {word: spanish for entries in _GLOSSARY.values() for word, spanish in entries.items()}


@dataclass(frozen=True)
class Form:
    """A kind of sentence.

    Attributes:
        template: Words; ``<x>`` stands for any word of category x, ``<number>`` for several digits.
        weight: Share of the draws, in percent.
        digits: Least and most digits that ``<number>`` has.
    """

    template: str
    weight: int
    digits: tuple[int, int] = (2, 3)

    @property
    def pattern(self) -> re.Pattern[str]:
        """Regular expression that matches exactly the sentences of the form, one named group for each slot."""
        return re.compile(" ".join(self._part(token) for token in self.template.split()))

    def _part(self, token: str) -> str:
        if not token.startswith("<"):
            return token
        category = token[1:-1]
        any_word = "(?:" + "|".join(CATEGORIES[category]) + ")"
        if category == "number":
            low, high = self.digits
            any_word = f"{any_word}(?: {any_word}){{{low - 1},{high - 1}}}"
        return f"(?P<{_slot(category)}>{any_word})"


FORMS: dict[str, Form] = {
    "digits": Form("<number>", 12, digits=(2, 6)),
    "mark": Form("<det> <mood> <animal> <verb> <prep> <mark> <number>", 12),
    "vehicle": Form("<vehicle> <number> <move> <prep> the <place>", 13),
    "short": Form("<det> <animal> <verb> <time>", 8),
    "plain": Form("<det> <size> <color> <animal> <verb> <prep> the <place>", 9),
    "time_first": Form("<time> <det> <mood> <color> <animal> <verb> <prep> the <place>", 9),
    "place_first": Form("<prep> the <place> <det> <mood> <animal> <verb> <time>", 10),
    "adverb_first": Form("<adverb> <det> <size> <color> <animal> <verb> <prep> the <place>", 9),
    "object": Form("<det> <mood> <animal> <take> the <size> <object> <prep> the <place>", 9),
    "long": Form("<det> <mood> <size> <animal> <verb> <prep> the <color> <place> <time>", 9),
}


@dataclass(frozen=True)
class Sentence:
    """A sentence of the demo world.

    Attributes:
        words: Spoken words, lower case.
        slots: Category -> word; ``verb`` also holds words of ``move`` and ``take``, ``number`` all digits
            as one string.
    """

    words: tuple[str, ...]
    slots: Mapping[str, str] = field(hash=False)

    @property
    def text(self) -> str:
        """The words joined by single spaces."""
        return " ".join(self.words)


def grammar_words() -> tuple[str, ...]:
    """Return all spoken words, each once."""
    return tuple(SPANISH)


def sample_sentence(rng: random.Random, form: str | None = None) -> Sentence:
    """Draw a sentence; without ``form`` the form is drawn by its weight.

    Raises:
        ValueError: If ``form`` is unknown.
    """
    if form is None:
        form = rng.choices(list(FORMS), weights=[f.weight for f in FORMS.values()])[0]
    elif form not in FORMS:
        raise ValueError(f"unknown form {form!r}; use one of {', '.join(FORMS)}")
    spoken: list[str] = []
    slots: dict[str, str] = {}
    for token in FORMS[form].template.split():
        if token.startswith("<"):
            category = token[1:-1]
            count = rng.randint(*FORMS[form].digits) if category == "number" else 1
            drawn = [rng.choice(CATEGORIES[category]) for _ in range(count)]
            slots[_slot(category)] = " ".join(drawn)
            spoken += drawn
        else:
            spoken.append(token)
    return Sentence(tuple(spoken), slots)


def parse_sentence(text: str) -> Sentence:
    """Recover the sentence from its transcript.

    Raises:
        ValueError: If ``text`` is not a sentence of the grammar.
    """
    for pattern in _PATTERNS.values():
        match = pattern.fullmatch(text)
        if match:
            return Sentence(tuple(text.split(" ")), match.groupdict())
    raise ValueError(
        f"{text!r} is not a sentence of the demo grammar; give lower-case words, single spaces, in one of the forms: "
        + "; ".join(f.template for f in FORMS.values())
    )


def references(text: str) -> dict[str, str]:
    """Return the right answer of every demo task for a transcript.

    Raises:
        ValueError: If ``text`` is not a sentence of the grammar.
    """
    sentence = parse_sentence(text)
    return {task: answer(sentence) for task, answer in ANSWERS.items()}


def _slot(category: str) -> str:
    return "verb" if category in ("move", "take") else category


def _after(word: str, table: tuple[str, ...]) -> str:
    """Return the next word of the table, and the first behind the last."""
    return table[(table.index(word) + 1) % len(table)]


def _who(s: Sentence) -> str:
    if "vehicle" in s.slots:
        return f"{s.slots['vehicle']} {s.slots['number']}"
    return s.slots.get("animal", "nobody")


def _where(s: Sentence) -> str:
    if "mark" in s.slots:
        return f"{s.slots['mark']} {s.slots['number']}"
    return s.slots.get("place", "nowhere")


def _keywords(s: Sentence) -> list[str]:
    if "verb" not in s.slots:
        return [s.words[0], s.words[-1]]
    return [_who(s), s.slots["verb"], *([] if _where(s) == "nowhere" else [_where(s)])]


def _continue(s: Sentence) -> str:
    if "verb" not in s.slots:
        return f"and then {_after(s.words[-1], DIGITS)}"
    subject = s.slots.get("animal") or s.slots["vehicle"]
    if "object" in s.slots:
        return f"then the {subject} drops the {s.slots['object']}"
    verb = s.slots["verb"]
    action = f"then the {subject} {_after(verb, CATEGORIES['move' if 'vehicle' in s.slots else 'verb'])}"
    if "place" in s.slots:
        return f"{action} near the {_after(s.slots['place'], CATEGORIES['place'])}"
    return f"{action} again"


def _sentiment(s: Sentence) -> str:
    if "mood" not in s.slots:
        return "neutral"
    return "positive" if s.slots["mood"] in HAPPY_MOODS else "negative"


def _chat(s: Sentence) -> str:
    if "verb" not in s.slots:
        return f"tell me more about the number {s.text}"
    return f"tell me more about the {s.slots.get('animal') or s.slots['vehicle']}"


def _yes(condition: bool) -> str:
    return "yes" if condition else "no"


_PATTERNS = {name: form.pattern for name, form in FORMS.items()}

ANSWERS: dict[str, Callable[[Sentence], str]] = {
    # trained
    "transcribe": lambda s: s.text,
    "continue": _continue,
    "translate": lambda s: " ".join(SPANISH[word] for word in s.words),
    "keywords": lambda s: ", ".join(_keywords(s)),
    "who": _who,
    "where": _where,
    "doing": lambda s: s.slots.get("verb", "nothing"),
    "sentiment": _sentiment,
    "count": lambda s: NUMBER_WORDS[len(s.words)],
    "upper": lambda s: s.text.upper(),
    "quoted": lambda s: f'"{s.text}"',
    "json": lambda s: json.dumps({"who": _who(s), "where": _where(s)}),
    "first": lambda s: s.words[0],
    "color": lambda s: s.slots.get("color", "none"),
    "water": lambda s: _yes(s.slots.get("place") in WATER_PLACES),
    "when": lambda s: s.slots.get("time", "none"),
    "chat": _chat,
    # held out
    "last": lambda s: s.words[-1],
    "reverse": lambda s: " ".join(reversed(s.words)),
    "spell": lambda s: " ".join(s.words[0]),
    "bullets": lambda s: "* " + " * ".join(_keywords(s)),
    "digits": lambda s: _yes("number" in s.slots),
    "size": lambda s: s.slots.get("size", "none"),
    "title": lambda s: " ".join(word.capitalize() for word in s.words),
    "second": lambda s: s.words[1],
    "ending": lambda s: f"{s.text} the end",
}
