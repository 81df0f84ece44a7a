# SPDX-License-Identifier: Apache-2.0
"""The report of made-up answers: what it shows, and that nothing in it is taken for markup."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile

from nemo_mtbi.evaluation.figures import AnsweredSet, Resampling, SystemAnswers
from nemo_mtbi.evaluation.items import Clip, EvalSet, Item, Reply
from nemo_mtbi.evaluation.report import render_report
from nemo_mtbi.evaluation.results import collect_results
from nemo_mtbi.evaluation.settings import EvalConfig, SystemConfig
from nemo_mtbi.evaluation.tables import markdown

EVIL = "</style><script>alert(1)</script> | \x07"


class Tree(HTMLParser):
    """Counts tags and checks that each is closed."""

    def __init__(self):
        super().__init__()
        self.open, self.count, self.text = [], {}, ""

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def answered(tmp_path):
    paths = [tmp_path / f"{index}.wav" for index in range(3)]
    for path in paths[:2]:
        soundfile.write(path, np.sin(np.arange(4000) / 9), 8000)
    clips = [Clip(f"u{index}", path, EVIL) for index, path in enumerate(paths)]
    items = [Item(clip, "t", "seen", prompt, ("exact",), "a") for clip in range(3) for prompt in (EVIL, "q")]
    replies = {"small": "abcaaa", "large": "aaaaab", "text": "aaaaaa"}
    systems = {
        n: SystemAnswers(items, [[Reply(x if x != "b" else EVIL, 1, False) for x in a]]) for n, a in replies.items()
    }
    return AnsweredSet(EvalSet("s", clips, items, {EVIL: 2}, (EVIL,)), systems, {})


def config(**changes):
    systems = {
        "small": SystemConfig(nemo="s.nemo", hours=1.0, line="ours"),
        "large": SystemConfig(nemo="l.nemo", hours=10.0, line="ours"),
        "text": SystemConfig(kind="text", of="large"),
    }
    return EvalConfig("out", systems=systems, sets={}, compare_with="large", examples=3, **changes)


def test_every_plot_is_there_and_nothing_is_taken_for_markup(answered):
    results = collect_results(config(), [answered], Resampling(50))
    curves = {"large": {"val_agreement": [[(1, 0.1), (2, 0.5)], [(1, 0.2), (2, 0.4)]]}}
    page = render_report(results, curves, [answered], config())
    tree = Tree()
    tree.feed(page)
    assert not tree.open and tree.count["svg"] == 5 and tree.count["script"] == 1 and tree.count["style"] == 1
    for title in ("Generalization", "Prompt sensitivity", "Behavior gap against hours", "Learning curves", "Examples"):
        assert title in tree.text
    assert "alert(1)" in tree.text and "\x07" not in page
    assert "Left out: 2 items" in tree.text and "no audio: unreadable" in tree.text
    assert page == render_report(results, curves, [answered], config())
    assert "| small |" in markdown(results)


def test_systems_of_one_line_share_a_color_and_the_largest_is_drawn(answered):
    results = collect_results(config(), [answered], Resampling(50))
    page = render_report(results, {}, [answered], config())
    bars = re.search(r'<svg[^>]*aria-label="Right answers, s">.*?</svg>', page)[0]
    assert "large, seen" in bars and "text, seen" in bars and "small, seen" not in bars
    dots = re.search(r'<svg[^>]*aria-label="Right answers by wording.*?</svg>', page)[0]
    assert set(re.findall(r'<circle[^>]*fill="([^"]+)"[^>]*><title>(\w+)', dots)) == {
        ("var(--c0)", "small"),
        ("var(--c0)", "large"),
        ("var(--c1)", "text"),
    }


def test_players_hold_the_sound(answered):
    page = render_report(collect_results(config(), [answered], Resampling(50)), {}, [answered], config())
    sounds = re.findall(r'src="data:audio/flac;base64,([^"]+)"', page)
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(sounds[0])))
    assert rate == 16000 and len(samples) == 8000 and np.abs(samples).max() > 0.9


def test_without_hours_or_logs_there_is_no_such_plot(answered):
    plain = config()
    for system in plain.systems.values():
        system.hours = None
    page = render_report(collect_results(plain, [answered], Resampling(50)), {}, [answered], plain)
    assert "hours of speech trained on" not in page and "Learning curves" not in page


def test_without_a_text_system_there_are_scores_and_no_behavior(answered):
    alone = EvalConfig("out", systems={"small": SystemConfig(nemo="s.nemo")}, sets={}, compare_with="small")
    part = AnsweredSet(answered.chosen, {"small": answered.systems["small"]}, {})
    found = collect_results(alone, [part], Resampling(50))["sets"]["s"]["systems"]["small"]["seen"]
    assert found["right"]["value"] == pytest.approx(4 / 6) and "agreement" not in found
    assert "Examples" in render_report(collect_results(alone, [part], Resampling(50)), {}, [part], alone)


def test_names_of_systems_sets_and_utterances_stay_text(answered):
    """Names stand in attributes and in SVG, too; a quote or an angle bracket in them ends neither."""
    evil = "\"'><img src=x onerror=alert(2)></svg>{{ 7 * 7 }}"
    systems = {f"{name}{evil}": system for name, system in config(title=evil).systems.items()}
    systems[f"text{evil}"].of = f"large{evil}"
    hostile = EvalConfig("out", evil, systems, {}, compare_with=f"large{evil}", examples=3)
    chosen = answered.chosen
    clips = [Clip(clip.id + evil, clip.audio, clip.transcript) for clip in chosen.clips]
    items = [Item(x.clip, evil, evil, x.prompt, x.metrics, evil) for x in chosen.items]
    given = {f"{name}{evil}": SystemAnswers(items, asked.seeds) for name, asked in answered.systems.items()}
    part = AnsweredSet(EvalSet(evil, clips, items, {}, ()), given, {})
    curves = {f"large{evil}": {"val_agreement": [[(1, 0.1), (2, 0.5)]]}}
    page = render_report(collect_results(hostile, [part], Resampling(50)), curves, [part], hostile)
    tree = Tree()
    tree.feed(page)
    assert not tree.open and "img" not in tree.count and tree.count["script"] == 1
    assert "<img" not in page and evil in tree.text
