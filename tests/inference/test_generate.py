# SPDX-License-Identifier: Apache-2.0
from collections import Counter

import pytest
import torch
import torch.distributed as dist

from nemo_mtbi.config.generation import GenerationConfig
from nemo_mtbi.inference.generate import Generated, evaluating, generate, left_pad

NEW = 10


@pytest.fixture(scope="module")
def frames(speech_llm):
    generator = torch.Generator().manual_seed(1)
    size = speech_llm.decoder.config.hidden_size
    return 0.3 * torch.randn(12, size, generator=generator, dtype=torch.float64)


def prompts(seed=0, count=9):
    """Layouts of many lengths: text alone, speech alone, both interleaved."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, n):
        return torch.randint(low, high, (n,), generator=generator).tolist()

    lengths = draw(1, 30, count)
    return [
        [draw(0, 128, 1), draw(-12, 0, 1), draw(-12, 128, 1)][i % 3] + draw(-12, 128, n - 1)
        for i, n in enumerate(lengths)
    ]


@torch.no_grad()
def greedy(model, layout, frames, end_id, new):
    """One row, without a cache, a mask or padding."""
    layout, answer = list(layout), []
    while len(answer) < new:
        embeddings = model.embed(torch.tensor([layout]), frames)  # [T, 1, H]
        last = model.decoder.hidden(embeddings)
        token = int(model.decoder.logits(last, torch.tensor([len(layout) - 1])).argmax())
        if token == end_id:
            return Generated(answer, truncated=False)
        answer.append(token)
        layout.append(token)
    return Generated(answer, truncated=True)


@pytest.fixture(scope="module")
def end_id(speech_llm, frames):
    """A token that some answers hold and others don't, so that rows end at different steps."""
    answers = [greedy(speech_llm, layout, frames, None, NEW).ids for layout in prompts()]
    assert len({tuple(answer) for answer in answers}) == len(answers)  # the prompts matter
    holders = Counter(token for answer in answers for token in set(answer))
    return next(token for token, count in holders.most_common() if count <= len(answers) // 2)


@pytest.mark.parametrize("batch_tokens", [1, 90, 10**6])
def test_a_batch_answers_as_each_row_alone_without_a_cache(speech_llm, frames, end_id, batch_tokens):
    layouts = prompts()
    expected = [greedy(speech_llm, layout, frames, end_id, NEW) for layout in layouts]
    assert {answer.truncated for answer in expected} == {True, False}
    assert any(0 < len(answer.ids) < NEW for answer in expected)
    assert generate(speech_llm, layouts, frames, end_id, GenerationConfig(NEW, batch_tokens)) == expected


@pytest.mark.parametrize("seed", range(1, 6))
def test_other_prompts(speech_llm, frames, end_id, seed):
    layouts = prompts(seed, count=4)
    expected = [greedy(speech_llm, layout, frames, end_id, NEW) for layout in layouts]
    assert generate(speech_llm, layouts, frames, end_id, GenerationConfig(NEW)) == expected


def test_an_answer_ends_at_the_first_of_several_tokens(speech_llm, frames, end_id):
    """Each row at its own, without that token, and none of them is marked as cut."""
    layouts = prompts()
    free = [greedy(speech_llm, layout, frames, None, NEW).ids for layout in layouts]
    ends = {end_id, *(ids[6] for ids in free)}
    found = generate(speech_llm, layouts, frames, ends, GenerationConfig(NEW))
    for ids, answer in zip(free, found, strict=True):
        stop = min(place for place, token in enumerate(ids) if token in ends)
        assert answer == Generated(ids[:stop], truncated=False)


def test_an_end_at_the_first_and_at_the_last_step(speech_llm, frames):
    layout = prompts()[2]
    ids = greedy(speech_llm, layout, frames, None, 4).ids
    first = generate(speech_llm, [layout], frames, ids[0], GenerationConfig(4))
    assert first == [Generated([], truncated=False)]
    place = ids.index(ids[3])
    last = generate(speech_llm, [layout], frames, ids[3], GenerationConfig(place + 1))
    assert last == [Generated(ids[:place], truncated=False)]
    cut = generate(speech_llm, [layout], frames, -1, GenerationConfig(1))
    assert cut == [Generated(ids[:1], truncated=True)]


def test_text_alone_needs_no_frames(speech_llm, frames):
    layouts = [[5, 6, 7], [9]]
    assert generate(speech_llm, layouts, frames[:0], 2, GenerationConfig(3)) == [
        greedy(speech_llm, layout, frames[:0], 2, 3) for layout in layouts
    ]
    assert generate(speech_llm, [], frames[:0], 2, GenerationConfig(3)) == []


def test_progress_counts_every_row_once(speech_llm, frames):
    done = []
    generate(speech_llm, prompts(), frames, 2, GenerationConfig(2, batch_tokens=60), done.append)
    assert sum(done) == 9 and len(done) > 1


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_decoder_is_restored(speech_llm, frames, training):
    decoder = speech_llm.decoder

    def stop(rows):
        assert not any(module.training for module in decoder.modules())
        raise KeyboardInterrupt

    decoder.train(training)
    try:
        generate(speech_llm, [[1]], frames, 2, GenerationConfig(2))
        assert decoder.training is training
        with pytest.raises(KeyboardInterrupt):
            generate(speech_llm, [[1]], frames, 2, GenerationConfig(2), stop)
        assert all(module.training is training for module in decoder.modules())
    finally:
        decoder.train()


def test_a_single_process_talks_to_nobody(speech_llm, frames, end_id, monkeypatch):
    expected = generate(speech_llm, prompts(), frames, end_id, GenerationConfig(NEW))
    names = "send recv isend irecv batch_isend_irecv broadcast all_reduce all_gather all_gather_into_tensor barrier"
    for name in [*names.split(), "broadcast_object_list", "all_gather_object"]:
        monkeypatch.setattr(dist, name, lambda *args, name=name, **kwargs: pytest.fail(f"{name} was called"))
    assert generate(speech_llm, prompts(), frames, end_id, GenerationConfig(NEW)) == expected


def test_each_module_gets_its_own_mode_back():
    modules = [torch.nn.Dropout(), torch.nn.Dropout().eval(), torch.nn.Sequential(torch.nn.Dropout())]
    with pytest.raises(KeyboardInterrupt), evaluating(modules):
        assert not any(part.training for module in modules for part in module.modules())
        raise KeyboardInterrupt
    assert [module.training for module in modules] == [True, False, True] and modules[2][0].training


def test_a_prompt_that_leaves_no_room_for_its_answer_is_refused(speech_llm, frames):
    limit = speech_llm.decoder.max_sequence_length  # 128
    assert len(generate(speech_llm, [[1] * (limit - 2)], frames, -1, GenerationConfig(2))[0].ids) == 2
    with pytest.raises(ValueError, match="127 positions; with max_new_tokens=2 the LLM takes 1 to 126"):
        generate(speech_llm, [[1], [1] * (limit - 1)], frames, 2, GenerationConfig(2))
    with pytest.raises(ValueError, match="0 positions"):
        generate(speech_llm, [[]], frames, 2, GenerationConfig(2))


def test_a_prompt_that_points_past_the_frames_is_refused(speech_llm, frames):
    with pytest.raises(ValueError, match="points at speech frame 12, but there are 12"):
        generate(speech_llm, [[1, -13]], frames, 2, GenerationConfig(2))
    with pytest.raises(ValueError, match="points at speech frame 0, but there are 0"):
        generate(speech_llm, [[1, -1]], frames[:0], 2, GenerationConfig(2))


def test_left_padding_masks_the_future_and_the_padding():
    layout, mask = left_pad([[4, 5, 6], [7]])
    assert layout.tolist() == [[4, 5, 6], [0, 0, 7]]
    seen = ~mask[:, 0]
    assert seen[0].int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert seen[1].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize("values", [{"max_new_tokens": 0}, {"batch_tokens": 0}])
def test_limits_below_one_are_refused(values):
    with pytest.raises(ValueError, match="at least 1"):
        GenerationConfig(**values)
