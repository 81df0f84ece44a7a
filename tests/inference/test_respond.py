# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import numpy as np
import pytest
import torch

from nemo_mtbi.config.generation import GenerationConfig
from nemo_mtbi.inference.respond import Responder
from nemo_mtbi.layouts.layout import speech
from nemo_mtbi.speech_llm.layout_decoder import LayoutDecoder
from nemo_mtbi.testing import tiny_chat

PROMPTS = ("say it", "first word", "count it", "")


@pytest.fixture(scope="module")
def responder(speech_llm, llm_dir):
    return Responder(speech_llm, tiny_chat(llm_dir / "tokenizer.model"), GenerationConfig(8, 400))


@pytest.fixture(scope="module")
def audio():
    rng = np.random.default_rng(3)
    return [torch.from_numpy(rng.standard_normal(n).astype(np.float32)) for n in (16000, 30000, 9000, 30000, 12345)]


REQUESTS = [(prompt, index) for index in range(5) for prompt in PROMPTS]


def test_answers_come_in_the_order_of_the_requests(responder, audio):
    expected = [responder.speech([audio[index]], [(prompt, 0)])[0] for prompt, index in REQUESTS]
    assert responder.speech(audio, REQUESTS) == expected
    assert responder.speech(audio, REQUESTS[::-1]) == expected[::-1]
    assert len(set(expected)) > 10  # audio and prompt matter


@pytest.mark.parametrize("seconds", [0.1, 2.0, 1000.0])
def test_encoding_in_groups_changes_no_frame(responder, audio, seconds):
    expected = torch.cat([responder.encode([samples]) for samples in audio])
    found = replace(responder, encode_seconds=seconds).encode(audio)
    assert len(found) == sum(responder.model.frame_counter(len(samples)) for samples in audio)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_encoding_drops_nothing_out_and_training_goes_on(responder, audio, monkeypatch):
    connector = responder.model.connector
    (dropout,) = (module for module in connector.modules() if isinstance(module, torch.nn.Dropout))
    expected = responder.encode(audio)
    monkeypatch.setattr(dropout, "p", 0.5)
    connector.train()
    assert torch.equal(responder.encode(audio), expected)
    assert all(module.training for module in connector.modules())


def test_an_utterance_is_encoded_once_for_all_that_is_asked_about_it(responder, audio, monkeypatch):
    encoded = []
    encode = responder.model.encode_audio

    def count(samples, lengths, *rest):
        encoded.extend(lengths.tolist())
        return encode(samples, lengths, *rest)

    monkeypatch.setattr(responder.model, "encode_audio", count)
    responder.speech(audio, REQUESTS)
    assert sorted(encoded) == sorted(map(len, audio))


def test_speech_is_the_prompt_around_the_frames(responder, audio):
    frames = responder.encode(audio[:1])
    layout = responder.chat.prompt("say it", speech(0, len(frames)))
    (answer,) = responder.layouts([layout], frames)
    assert responder.speech(audio[:1], [("say it", 0)]) == [responder.chat.decode(answer.ids)]


def test_text_needs_no_encoder(responder):
    requests = [(prompt, text) for prompt in PROMPTS for text in ("red cat runs", "blue dog", "one")]
    alone = Responder(LayoutDecoder(responder.model.decoder), responder.chat, responder.config)
    found = alone.text(requests)
    assert found == responder.text(requests)
    assert found == [responder.text([request])[0] for request in requests]
    assert len(set(found)) > 6


def test_progress_counts_every_row(responder, audio):
    steps = []
    responder.speech(audio, REQUESTS, steps.append)
    responder.text([("say it", "red cat")] * 3, steps.append)
    assert sum(steps) == len(REQUESTS) + 3


def test_nothing_asked_is_nothing_answered(responder, audio):
    assert responder.speech([], []) == responder.text([]) == responder.speech(audio, []) == []


def test_audio_without_a_frame_is_named(responder, audio):
    with pytest.raises(ValueError, match="utterance 1 has 9 samples: too short for one speech frame"):
        responder.speech([audio[0], audio[1][:9]], [("say it", 0), ("say it", 1)])


def test_audio_that_is_too_long_is_refused_before_it_is_encoded(responder, monkeypatch):
    monkeypatch.setattr(responder.model, "encode_audio", lambda *args: pytest.fail("it was encoded"))
    with pytest.raises(ValueError, match="the LLM takes 1 to 120: use shorter audio"):
        responder.speech([torch.randn(40 * 16000)], [("say it", 0)])


def test_a_layout_past_the_last_frame_is_refused(responder, audio):
    frames = responder.encode(audio[:1])
    with pytest.raises(ValueError, match=f"points at speech frame {len(frames)}, but there are {len(frames)} frames"):
        responder.layouts([speech(0, len(frames) + 1)], frames)
