# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_mtbi.config.connector import KINDS, ConnectorConfig, ConnectorKind
from nemo_mtbi.layouts.frames import FrameCounter
from nemo_mtbi.speech_llm.connector import (
    CONNECTORS,
    Connector,
    build_connector,
    connector_stages,
    register_connector,
)

SHAPES = [("conv", 3), ("conv", 5), ("conv", 1), ("stack", 3), ("qformer", 3), ("conformer", 3), ("cif", 3)]


def connector(kind, kernel=3, rate=6.25, encoder_rate=12.5, seed=0):
    torch.manual_seed(seed)
    config = ConnectorConfig(kind=kind, frame_rate=rate, hidden_size=6, kernel_size=kernel, heads=2)
    return build_connector(config, input_size=4, output_size=5, encoder_rate=encoder_rate).double().eval()


def noise(lengths, seed=0):
    """Frames whose padding is noise too, so that a padding that leaks shows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(lengths), max(lengths), 4, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kind, kernel", SHAPES)
@pytest.mark.parametrize("rate", [25.0, 12.5, 6.25, 3.125])
def test_frames_are_those_that_the_counter_counts(kind, kernel, rate):
    model = connector(kind, kernel, rate, encoder_rate=25.0)
    assert model.reduction == 25 / rate
    count = FrameCounter(model.stages, 1)
    assert count.samples_per_frame == model.reduction
    lengths = list(range(70))
    frames, found = model(noise(lengths), torch.tensor(lengths))
    assert found.tolist() == [count(n) for n in lengths]
    assert frames.shape[1] >= max(found)
    for n in lengths[1:]:  # alone, no frame is missing
        alone, length = model(noise([n]), torch.tensor([n]))
        assert alone.shape[1] == length.item() == count(n)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(SHAPES), st.sampled_from([12.5, 6.25, 3.125]), st.lists(st.integers(1, 30), min_size=1, max_size=5)
)
def test_an_utterance_gives_the_same_frames_alone_and_in_a_batch(shape, rate, lengths):
    model = connector(*shape, rate)
    batch = noise(lengths)
    together, counts = model(batch, torch.tensor(lengths))
    for u, n in enumerate(lengths):
        alone, count = model(batch[u : u + 1, :n], torch.tensor([n]))
        assert count.item() == counts[u]
        torch.testing.assert_close(together[u, : counts[u]], alone[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind, kernel", SHAPES)
def test_gradients_reach_every_weight_and_only_valid_frames(kind, kernel):
    model, lengths = connector(kind, kernel), [9, 4]
    frames = noise(lengths).requires_grad_(True)
    out, counts = model(frames, torch.tensor(lengths))
    sum(out[u, :n].square().sum() for u, n in enumerate(counts)).backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in model.parameters())
    assert (frames.grad[0, :8] != 0).any(-1).all() or kernel == 1  # the ninth is left over where two are stacked
    assert (frames.grad[1, 4:] == 0).all()


def test_frame_order_and_position_matter():
    """A connector that mixed up time and width would give the right shapes."""
    model = connector("stack")
    frames = noise([6])
    out, _ = model(frames, torch.tensor([6]))
    by_hand = torch.stack([torch.cat([frames[0, 2 * i], frames[0, 2 * i + 1]]) for i in range(3)])
    torch.testing.assert_close(out[0], model.mlp(model.norm(by_hand)), rtol=0, atol=1e-12)


def test_a_query_sees_the_frames_of_its_window_only():
    model = connector("qformer", rate=12.5 / 4)
    frames = noise([12]).requires_grad_(True)
    out, _ = model(frames, torch.tensor([12]))
    out[0, 1].square().sum().backward()
    assert [bool(row.any()) for row in frames.grad[0]] == [False] * 4 + [True] * 4 + [False] * 4


class Weights(torch.nn.Module):
    """Gives the logits of chosen weights, whatever the frames are."""

    def __init__(self, weights):
        super().__init__()
        self.logits = torch.logit(torch.tensor(weights, dtype=torch.float64) - 1e-4).view(1, 1, -1)

    def forward(self, frames):
        return self.logits


def test_integrate_and_fire_by_hand():
    """Five frames at half the rate are three vectors; the second frame belongs to the first two of them."""
    model = connector("cif", rate=12.5 / 2)
    frames = noise([5])
    model.weigh = Weights([0.6, 0.6, 0.8, 0.5, 0.5])
    a, b, c, d, e = frames[0]
    by_hand = torch.stack([0.6 * a + 0.4 * b, 0.2 * b + 0.8 * c, 0.5 * d + 0.5 * e])
    torch.testing.assert_close(model.reduce(frames, torch.tensor([5]))[0], by_hand, rtol=0, atol=1e-6)


def test_equal_weights_are_means_of_windows():
    model = connector("cif", rate=12.5 / 4)
    model.weigh = Weights([0.5] * 12)
    frames = noise([12])
    means = frames.view(1, 3, 4, -1).mean(2)
    torch.testing.assert_close(model.reduce(frames, torch.tensor([12])), means, rtol=0, atol=1e-6)


def test_an_utterance_shorter_than_a_stack_gives_no_frame():
    frames, lengths = connector("stack", rate=3.125)(noise([3]), torch.tensor([3]))
    assert frames.shape == (1, 0, 5)
    assert lengths.tolist() == [0]


@pytest.mark.parametrize(
    "kind, wanted, encoder_rate, reduction",
    [
        ("conv", 6.25, 12.5, 2),
        ("conv", 6.25, 25.0, 4),
        ("conv", 12.5, 12.5, 1),
        ("conv", 6.0, 50.0, 8),
        ("stack", 2.5, 12.5, 5),
        ("stack", 4.2, 12.5, 3),
        ("stack", 12.5, 12.5, 1),
    ],
)
def test_the_nearest_possible_rate_is_taken(kind, wanted, encoder_rate, reduction):
    assert ConnectorConfig(kind=kind, frame_rate=wanted).reduction(encoder_rate) == reduction


@pytest.mark.parametrize(
    "settings, encoder_rate, message",
    [
        ({"kind": "conv", "frame_rate": 4.4}, 12.5, "choose one of 12.5, 6.25, 3.125"),
        ({"kind": "stack", "frame_rate": 25.0}, 12.5, "12.5"),
        ({"frame_rate": 0.0}, 12.5, "frame_rate 0.0 Hz"),
        ({"frame_rate": -6.25}, 12.5, "frame_rate -6.25 Hz"),
    ],
)
def test_a_rate_that_the_encoder_cannot_give_is_refused_with_those_it_can(settings, encoder_rate, message):
    with pytest.raises(ValueError, match=message):
        ConnectorConfig(**settings).reduction(encoder_rate)


WRONG = [({"kind": "linear"}, "kind"), ({"kernel_size": 4}, "kernel_size"), ({"layers": 0}, "layers")]
WRONG += [({"kind": "qformer", "heads": 7}, "heads"), ({"kind": "conformer", "heads": 0}, "heads")]


@pytest.mark.parametrize("settings, key", WRONG)
def test_wrong_shapes_are_refused_by_the_name_of_their_key(settings, key):
    with pytest.raises(ValueError, match=f"model.connector.{key}"):
        ConnectorConfig(**settings)


def test_every_kind_of_the_configuration_has_a_class():
    assert CONNECTORS.keys() == KINDS.keys()


@pytest.fixture
def mean_connector():
    """A kind of connector from outside of the package: the mean of neighboring frames."""

    @register_connector("mean", ConnectorKind(factors=range(1, 9)))
    class MeanConnector(Connector):
        def __init__(self, config, input_size, output_size, encoder_rate):
            super().__init__(config, input_size, output_size, encoder_rate)
            self.project(config, input_size, output_size)

        def reduce(self, frames, lengths):
            whole = frames.shape[1] // self.reduction
            return frames[:, : whole * self.reduction].unflatten(1, (whole, self.reduction)).mean(2)  # [U, C, D]

    yield MeanConnector
    del CONNECTORS["mean"], KINDS["mean"]


def test_a_connector_from_outside(mean_connector):
    model = connector("mean", rate=12.5 / 3)
    assert isinstance(model, mean_connector) and model.reduction == 3 and model.dtype == torch.float64
    assert model.stages == connector_stages(ConnectorConfig("mean", 12.5 / 3), 12.5)
    frames = noise([7])
    out, counts = model(frames, torch.tensor([7]))
    by_hand = torch.stack([frames[0, :3].mean(0), frames[0, 3:6].mean(0)])
    assert counts.tolist() == [2]
    torch.testing.assert_close(out[0], model.mlp(model.norm(by_hand)), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="frame_rate 1.0 Hz can't be made from an encoder at 12.5 Hz with kind=mean"):
        ConnectorConfig("mean", 1.0).reduction(12.5)


def test_names_of_connectors_are_taken_once(mean_connector):
    with pytest.raises(ValueError, match="'mean' is registered already"):
        register_connector("mean", ConnectorKind())(mean_connector)
    with pytest.raises(ValueError, match="'other' is unknown to the configuration"):
        register_connector("other")(mean_connector)
