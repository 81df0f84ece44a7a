# SPDX-License-Identifier: Apache-2.0
"""Divergences between two distributions over a vocabulary, against dense float64 definitions."""

import math
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_mtbi.config.checks import choices
from nemo_mtbi.config.loss import LossConfig
from nemo_mtbi.speech_llm import losses
from nemo_mtbi.speech_llm.losses import hidden_distance, response_divergence

DIVERGENCES = choices(LossConfig, "divergence")

kinds = st.sampled_from(DIVERGENCES)
temperatures = st.floats(0.2, 20)


def pair(n=4, vocabulary=9, seed=0, scale=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(n, vocabulary, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(2)]


def dense(student, teacher, kind, temperature=1.0):
    """Sum over rows, from the definition, as a graph of torch's own operations."""
    q, p = (values.double().div(temperature).softmax(-1) for values in (student, teacher))

    def kl(one, other):
        return torch.special.xlogy(one, one / other).sum()

    m = (p + q) / 2
    return {"forward_kl": lambda: kl(p, q), "reverse_kl": lambda: kl(q, p), "js": lambda: (kl(p, m) + kl(q, m)) / 2}[
        kind
    ]()


def with_gradient(function, student, *arguments):
    leaf = student.clone().requires_grad_(True)
    value = function(leaf, *arguments)
    value.backward()
    return value.detach(), leaf.grad


def assert_close(found, expected, tolerance=1e-11):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------- value and gradient


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 6), st.integers(1, 30), kinds, temperatures, st.integers(0, 99))
def test_it_is_the_dense_divergence_and_its_gradient(n, vocabulary, kind, temperature, seed):
    student, teacher = pair(n, vocabulary, seed)
    expected = with_gradient(dense, student, teacher, kind, temperature)
    assert_close(with_gradient(response_divergence, student, teacher, kind, temperature), expected)
    scaled = with_gradient(response_divergence, student, teacher, kind, temperature, True)
    assert_close(scaled, [value * temperature**2 for value in expected], 1e-9)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_gradients_are_those_of_finite_differences(kind, temperature):
    student, teacher = pair(3, 6)
    leaf = student.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: response_divergence(x, teacher, kind, temperature, True), leaf)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_the_teacher_gets_no_gradient(kind):
    student, teacher = (values.requires_grad_(True) for values in pair())
    response_divergence(student, teacher, kind).backward()
    assert student.grad.abs().max() > 0.01 and teacher.grad is None


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(kind, dtype):
    student, teacher = pair(200, 50, dtype=dtype)
    value, gradient = with_gradient(response_divergence, student, teacher, kind)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(value.double(), dense(student, teacher, kind), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_logits_of_any_size_overflow_nothing(kind):
    student, teacher = pair(5, 40)
    far = 1e4 * torch.ones(5, 1)
    expected = with_gradient(response_divergence, student, teacher, kind)
    assert_close(with_gradient(response_divergence, student + far, teacher - far, kind), expected, 1e-9)


def test_rows_that_differ_are_refused():
    with pytest.raises(ValueError, match="select the positions of the same response tokens from both"):
        response_divergence(torch.zeros(3, 5), torch.zeros(1, 5))


# ------------------------------------------------------------------------------------------------------ what holds


@settings(max_examples=60, deadline=None)
@given(kinds, temperatures, st.integers(0, 999), st.floats(0.01, 20))
def test_it_is_positive_and_zero_only_between_equals(kind, temperature, seed, scale):
    student, teacher = pair(1, 7, seed, scale)
    value, gradient = with_gradient(response_divergence, student, teacher, kind, temperature)
    assert value > 0  # two draws are never equal
    shifted = teacher + 3.5  # of the same probabilities
    value, gradient = with_gradient(response_divergence, shifted, teacher, kind, temperature)
    assert abs(value) < 1e-13 and gradient.abs().max() < 1e-13


@settings(max_examples=60, deadline=None)
@given(temperatures, st.integers(0, 999), st.floats(0.01, 1000))
def test_jensen_shannon_is_symmetric_and_bounded(temperature, seed, scale):
    student, teacher = pair(1, 7, seed, scale)
    one, other = (response_divergence(*both, "js", temperature) for both in ((student, teacher), (teacher, student)))
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-15)
    assert 0 <= one <= math.log(2) + 1e-12


@given(temperatures, st.integers(0, 999))
def test_reverse_kl_is_forward_kl_with_the_sides_changed(temperature, seed):
    student, teacher = pair(2, 7, seed)
    torch.testing.assert_close(
        response_divergence(student, teacher, "reverse_kl", temperature),
        response_divergence(teacher, student, "forward_kl", temperature),
    )


@settings(max_examples=30, deadline=None)
@given(kinds, st.integers(0, 999))
def test_at_a_high_temperature_it_is_the_distance_of_logits(kind, seed):
    """Times the squared temperature, it tends to half the variance over the vocabulary of the difference of logits
    (arXiv 1503.02531, 2.1); Jensen-Shannon to an eighth."""
    student, teacher = pair(1, 7, seed)
    found = response_divergence(student, teacher, kind, 1e4, True)
    limit = (student - teacher).var(unbiased=False) / (8 if kind == "js" else 2)
    torch.testing.assert_close(found, limit, rtol=1e-2, atol=1e-4)
    assert response_divergence(student, teacher, kind, 1e4) < 1e-5


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(5)), st.permutations(range(5)))
def test_at_a_low_temperature_only_the_best_token_counts(one, other):
    student, teacher = (torch.tensor([order], dtype=torch.float64) for order in (one, other))
    found = response_divergence(student, teacher, "js", 0.01)
    same = student.argmax() == teacher.argmax()
    torch.testing.assert_close(found.item(), 0.0 if same else math.log(2), rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------- entries that pad the vocabulary


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_padding_of_the_vocabulary_counts_for_nothing(kind):
    student, teacher = pair()
    expected, gradient = with_gradient(response_divergence, student, teacher, kind, 2.0)
    padded = [torch.cat([values, torch.full((4, 3), -math.inf)], 1) for values in (student, teacher)]
    found, with_padding = with_gradient(response_divergence, *padded, kind, 2.0)
    assert_close([found, with_padding[:, :9]], [expected, gradient], 1e-15)
    assert (with_padding[:, 9:] == 0).all()


def test_a_token_that_only_one_side_may_say():
    one, other = torch.tensor([[0.0, -math.inf]]).double(), torch.tensor([[0.0, 0.0]]).double()
    assert response_divergence(one, other, "forward_kl") == math.inf  # the student never says what the teacher may
    torch.testing.assert_close(response_divergence(other, one, "forward_kl").item(), math.log(2))
    torch.testing.assert_close(response_divergence(one, other, "reverse_kl").item(), math.log(2))
    wanted = (math.log(4 / 3) + math.log(2 / 3) / 2 + math.log(2) / 2) / 2
    torch.testing.assert_close(response_divergence(one, other, "js").item(), wanted)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_what_is_not_a_number_is_not_hidden(kind):
    student, teacher = pair()
    student[2, 3] = math.nan
    assert response_divergence(student, teacher, kind).isnan()


# ---------------------------------------------------------------------------------------------------- hidden states


def test_the_distance_of_hidden_states():
    student, teacher = pair(5, 8)
    value, gradient = with_gradient(hidden_distance, student, teacher)
    torch.testing.assert_close(value, ((student - teacher) ** 2).sum() / 8)
    torch.testing.assert_close(gradient, (student - teacher) / 4)
    half = hidden_distance(student.bfloat16(), teacher.bfloat16())
    assert half.dtype == torch.float32


# ------------------------------------------------------------------------------------------------- a split vocabulary


def split_vocabulary():
    """Worker: each rank has its slice of the gradient of the dense value, and sees no logit of another."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, world, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    sent, reduce = [], dist.all_reduce

    def all_reduce(values, **kwargs):
        sent.append(values.numel())
        return reduce(values, **kwargs)

    losses.dist.all_reduce = all_reduce
    try:
        for kind in DIVERGENCES:
            # real tokens of each vocabulary; the last has a rank without any
            for n, real, size in ((17, 12, 12), (5, 11, 12), (1, 2, 2), (0, 8, 8), (3, 2, 4)):
                student, teacher = pair(n, real)
                student[:, 0] += 1e3  # one rank's overflow without the maximum over all
                padding = torch.full((n, size - real), -math.inf)
                mine = slice(rank * size // world, (rank + 1) * size // world)
                parts = [torch.cat([values, padding], 1)[:, mine] for values in (student, teacher)]
                found = with_gradient(response_divergence, *parts, kind, 2.0, True, group)
                expected, gradient = with_gradient(response_divergence, student, teacher, kind, 2.0, True)
                assert_close(found, (expected, torch.cat([gradient, torch.zeros_like(padding)], 1)[:, mine]))
                assert len(sent) == 3 and max(sent) <= 2 * n
                sent.clear()
    finally:
        losses.dist.all_reduce = reduce
        dist.destroy_process_group()


def test_a_vocabulary_split_over_two_ranks_gives_the_dense_value_and_gradient(processes):
    processes(split_vocabulary, timeout=60)


# ------------------------------------------------------------------------------------------------------ configuration


def test_cross_entropy_alone_is_the_default():
    config = LossConfig()
    assert (config.ce_weight, config.uses_teacher, config.parts) == (1.0, False, ())
    assert LossConfig(kl_weight=1.0).parts == ("ce", "kl")
    assert LossConfig(0.0, hidden_weight=1.0).parts == ("ce", "hidden")


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(ce_weight=-1.0), "model.loss.ce_weight is -1.0; it must be at least 0"),
        (dict(kl_weight=math.nan), "model.loss.kl_weight is nan"),
        (dict(hidden_weight=math.inf), "model.loss.hidden_weight is inf"),
        (dict(ce_weight=0.0), "nothing to learn from: give one of ce_weight, kl_weight, hidden_weight a weight"),
        (
            dict(kl_weight=1.0, divergence="kl"),
            "divergence is 'kl'; it must be one of forward_kl, reverse_kl",
        ),
        (dict(kl_weight=1.0, temperature=0.0), "model.loss.temperature is 0.0; it must be above 0"),
        (
            dict(temperature=2.0),
            "model.loss.temperature is 2.0, but model.loss.kl_weight is 0.*set kl_weight, or leave",
        ),
        (dict(hidden_weight=1.0, divergence="js"), "model.loss.divergence is js, but model.loss.kl_weight is 0"),
    ],
)
def test_values_that_contradict_are_refused_with_the_remedy(values, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**values)
