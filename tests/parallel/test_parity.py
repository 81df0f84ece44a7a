# SPDX-License-Identifier: Apache-2.0
"""Every parallel layout trains the connector as a single process does: loss, gradients and weights."""

import pickle

import pytest
import torch

from nemo_mtbi.parallel.groups import ParallelConfig

STEPS = 5
LAYOUTS = {  # name: layout and data-parallel size
    "tp2": (ParallelConfig(2), 1),
    "tp2_sp": (ParallelConfig(2, sequence_parallel=True), 1),
    "pp2": (ParallelConfig(1, 2), 1),
    "pp4": (ParallelConfig(1, 4), 1),
    "pp2_vp2": (ParallelConfig(1, 2, 2), 1),
    "tp2_pp2": (ParallelConfig(2, 2), 1),
    "tp2_pp2_sp": (ParallelConfig(2, 2, sequence_parallel=True), 1),
    "dp2": (ParallelConfig(), 2),
    "tp2_dp2": (ParallelConfig(2), 2),
    "pp2_dp2": (ParallelConfig(1, 2), 2),
}
DATA = {  # name: rows per utterance, interleaved, microbatches of equal length
    "k1": dict(rows=1, interleave=False),
    "k4": dict(rows=4, interleave=False),
    "k4_interleaved": dict(rows=4, interleave=True),
    "k4_equal": dict(rows=4, interleave=False, equal=True),
}
MODELS = {"tied": dict(tie_embeddings=True), "untied": dict(tie_embeddings=False, vocab_size=129)}


def build(folder, model, dtype):
    """The tiny model of a folder under the layout in force."""
    from nemo_mtbi.modules.connector import ConnectorConfig
    from nemo_mtbi.modules.pretrained import load_speech_llm

    torch.manual_seed(3)
    speech_llm, _ = load_speech_llm(
        f"{folder}/asr.nemo", f"{folder}/{model}", ConnectorConfig(hidden_size=24), dtype=dtype
    )
    if speech_llm.encoder is not None:
        speech_llm.encoder.encoder.to(dtype)
        speech_llm.connector.to(dtype)
    return speech_llm.train()


def train(speech_llm, batches):
    """Losses, gradients of the first step and weights after the last, as the training step of the model does it."""
    from nemo_mtbi.parallel import groups
    from nemo_mtbi.parallel.gradients import clip_gradients, gradient_norm, sum_gradients

    parameters = [value for value in speech_llm.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-2) if parameters else None
    losses, norms, first = [], [], None
    for batch in batches:
        for value in parameters:
            value.grad = None
        count = groups.data_parallel_sum(torch.tensor(float(batch.num_targets)))
        losses.append(groups.data_parallel_sum(speech_llm.train_step(batch, int(count))).item())
        sum_gradients(parameters)
        norm = gradient_norm(parameters, torch.device("cpu"))
        norms.append(norm.item())
        if first is None and parameters:
            first = {n: p.grad.clone() for n, p in speech_llm.connector.named_parameters()}
        clip_gradients(parameters, norm, 0.1)
        if optimizer:
            optimizer.step()
    weights = {n: p.detach().clone() for n, p in speech_llm.connector.named_parameters()} if parameters else None
    return {"losses": losses, "norms": norms, "gradients": first, "weights": weights}


def step_batches(data, sizes, part, parts):
    """The steps of one data-parallel process: its share of the utterances of each step."""
    from nemo_mtbi.data.layout import collate

    batches = []
    for step in data:
        mine = [u for u in range(len(step["audio"])) if u % parts == part]
        rows = [r.__class__(r.layout, r.labels, mine.index(r.utterance)) for r in step["rows"] if r.utterance in mine]
        audio = [torch.tensor(step["audio"][u]) for u in mine]
        frames, names = [step["frames"][u] for u in mine], [f"cut{u}" for u in mine]
        batch = collate(audio, frames, rows, sizes["micro_batch_tokens"], names)
        # NeMo's front end works in float32 and moves by 1e-6 with the length of the padding: let it be the same
        longest = max(len(samples) for samples in step["audio"])
        batch.audio = torch.nn.functional.pad(batch.audio, (0, longest - batch.audio.shape[1]))
        batches.append(batch)
    return batches


def compare(folder, name, case, dtype_name):
    """Worker: trains under a layout and compares with what a single process has written."""
    from nemo_mtbi.parallel import groups

    layout, data_size = LAYOUTS[name]
    groups.initialize(layout)
    assert groups.data_parallel_size() == data_size
    dtype = getattr(torch, dtype_name)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    with open(f"{folder}/data.pkl", "rb") as file:
        data = pickle.load(file)
    for model in MODELS:
        expected = torch.load(f"{folder}/{case}.{model}.{dtype_name}.pt", weights_only=True)
        batches = step_batches(data[case], data["sizes"], groups.data_parallel_rank(), data_size)
        found = train(build(folder, model, dtype), batches)
        context = f"{name} {case} {model}"
        for key in ("losses", "norms"):
            torch.testing.assert_close(
                torch.tensor(found[key]), torch.tensor(expected[key]), rtol=tolerance, atol=tolerance, msg=context
            )
        if not groups.is_first_stage():
            assert found["weights"] is None
            continue
        for key in ("gradients", "weights"):
            mine, theirs = (torch.cat([v.reshape(-1) for v in x[key].values()]) for x in (found, expected))
            error = (mine - theirs).norm() / theirs.norm()
            assert error <= tolerance, f"{context}: {key} differ by {error:.2e}"


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A folder with models, data and what a single process makes of them."""
    from nemo_mtbi.parallel import groups
    from nemo_mtbi.testing import tiny_asr_nemo, tiny_text_llm

    groups.initialize()
    folder = tmp_path_factory.mktemp("parity")
    for name, changes in MODELS.items():
        tiny_text_llm(folder / name, num_layers=4, **changes)
    tiny_asr_nemo(folder / "asr.nemo")
    model = build(folder, "tied", torch.float64)
    data = {name: [make_step(model.frame_counter, s, **kind) for s in range(STEPS)] for name, kind in DATA.items()}
    data["sizes"] = {"micro_batch_tokens": 110}
    with open(folder / "data.pkl", "wb") as file:
        pickle.dump(data, file)
    for case in DATA:
        for llm in MODELS:
            for dtype in ("float64", "float32"):
                found = train(build(folder, llm, getattr(torch, dtype)), step_batches(data[case], data["sizes"], 0, 1))
                torch.save(found, folder / f"{case}.{llm}.{dtype}.pt")
    return folder


def make_step(counter, seed, rows, interleave, equal=False):
    """Utterances of noise and rows of random tokens about them."""
    from nemo_mtbi.data.layout import make_row, speech

    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    audio, frames, made = [], [], []
    for utterance in range(4):
        samples = 16000 if equal else draw(6000, 24000)
        audio.append((0.1 * torch.randn(samples, generator=generator)).tolist())
        frames.append(counter(samples))
        for _ in range(rows):
            said = speech(0, frames[-1])
            if interleave:  # the middle is text
                said = said[: len(said) // 3] + [draw(4, 100) for _ in range(3)] + said[2 * len(said) // 3 :]
            prompt = [1, *(draw(4, 100) for _ in range(4 if equal else draw(1, 6))), *said, 5]
            response = [draw(4, 100) for _ in range(4 if equal else draw(1, 8))]
            made.append(make_row(prompt, response, utterance))
    return {"audio": audio, "frames": frames, "rows": made}


@pytest.mark.slow
@pytest.mark.parametrize("case", DATA)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parity_with_a_single_process(layout, case, reference, processes):
    config, data_size = LAYOUTS[layout]
    processes(compare, reference, layout, case, "float64", count=config.model_parallel_size * data_size)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parity_in_single_precision(layout, reference, processes):
    config, data_size = LAYOUTS[layout]
    processes(compare, reference, layout, "k4", "float32", count=config.model_parallel_size * data_size)
