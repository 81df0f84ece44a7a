# SPDX-License-Identifier: Apache-2.0
"""What tests/parallel/test_parity.py compares: layouts, cases, and the jobs that train them."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import parity_data as data
import torch
import torch.nn.functional as F

from nemo_mtbi.config.parallel import ParallelConfig

CLIP = 0.1
# Seconds for all cases of a layout; a mutated package may hang (scripts/experiments/mutate_parity.py).
TIMEOUT = float(os.environ.get("PARITY_TIMEOUT", "180"))
LAYOUTS = {  # name: layout and data-parallel size
    "single": (ParallelConfig(), 1),
    "tp2": (ParallelConfig(2), 1),
    "tp2_sp": (ParallelConfig(2, sequence_parallel=True), 1),
    "pp2": (ParallelConfig(1, 2), 1),
    "pp4": (ParallelConfig(1, 4), 1),
    "pp2_vp2": (ParallelConfig(1, 2, 2), 1),
    "tp2_pp2": (ParallelConfig(2, 2), 1),
    "tp2_pp2_sp": (ParallelConfig(2, 2, sequence_parallel=True), 1),
    "tp2_pp2_vp2_sp": (ParallelConfig(2, 2, 2, sequence_parallel=True), 1),
    "dp2": (ParallelConfig(), 2),
    "tp2_dp2": (ParallelConfig(2), 2),
    "pp2_dp2": (ParallelConfig(1, 2), 2),
}
STACK = dict(kind="stack", frame_rate=12.5 / 4)
MODELS = {  # name: what is special in the LLM, in the connector and in the encoder
    "tied": ({}, {}),
    "untied": (dict(tie_embeddings=False, vocab_size=129), {}),  # does not divide by TP
    "hearing": (dict(tie_embeddings=False), {}, dict(freeze=["pre_encode"])),  # the rest of the encoder trains
    "qkv_bias": (dict(add_qkv_bias=True, tie_embeddings=False), STACK),
    "qk_norm": (dict(qk_layernorm=True, kv_channels=16, vocab_size=129), {}),
}


@dataclass(frozen=True)
class Case:
    """Data and models that a layout trains on.

    Attributes:
        data: key of ``parity_data.DATA``.
        models: keys of ``MODELS``.
        dtype: of the LLM and the encoder; the connector's is float32 or better.
        recompute: ``model.activations_checkpoint_granularity``.
        trainer: steps are those of the NeMo model, run by Lightning.
    """

    data: str = "k4"
    models: tuple[str, ...] = ("tied", "untied")
    dtype: str = "float64"
    recompute: str | None = None
    trainer: bool = False

    def tolerance(self, key, exact):
        """Relative error that is allowed, of the whole vector of losses, norms, gradients, weights, or evaluation.

        ``exact``: the layout computes with the same tensors as a single process.
        """
        if self.dtype != "bfloat16":
            return {"float64": 1e-9, "float32": 1e-5}[self.dtype]
        if key == "gradients" and exact:
            return 1e-6  # of the first step; from then on the last bit of a weight may round a frame to its neighbour
        return 5e-3 if key in ("losses", "evaluation") else 5e-2


CASES = {
    "k1": Case("k1"),
    "k1_interleaved": Case("k1_interleaved", ("untied",)),
    "k4": Case("k4"),
    "k4_interleaved": Case("k4_interleaved"),
    "k4_equal": Case("k4_equal", ("untied",)),
    "text_rows": Case("text_rows", ("untied",)),
    "uneven": Case("uneven", ("untied",)),
    "qkv_bias": Case(models=("qkv_bias",)),
    "qk_norm": Case(models=("qk_norm",)),
    "hearing": Case(models=("hearing",)),
    "recompute_full": Case(models=("untied",), recompute="full"),
    "recompute_selective": Case(models=("untied",), recompute="selective"),
    "float32": Case(models=("untied",), dtype="float32"),
    "bfloat16": Case(models=("untied",), dtype="bfloat16"),
    "trainer": Case(models=("untied",), trainer=True),
    "kl": Case("kl", ("untied",)),
    "js_temperature": Case("js_temperature", ("untied",)),
}

# -------------------------------------------------------------------------------------------------------------- models


def build(folder, model, dtype, recompute=None, seed=3):
    """The tiny model of a folder under the layout in force."""
    from nemo_mtbi.config.connector import ConnectorConfig
    from nemo_mtbi.config.encoder import EncoderConfig
    from nemo_mtbi.config.model import ModelConfig
    from nemo_mtbi.speech_llm.pretrained import load_speech_llm

    torch.manual_seed(seed)
    _, connector, *encoder = MODELS[model]
    connector = ConnectorConfig(hidden_size=24, **connector)
    megatron = ModelConfig(activations_checkpoint_granularity=recompute).megatron
    megatron["encoder_config"] = EncoderConfig(**encoder[0]) if encoder else None
    speech_llm, _ = load_speech_llm(f"{folder}/asr.nemo", f"{folder}/{model}", connector, dtype, **megatron)
    if speech_llm.connector is not None and dtype == torch.float64:
        speech_llm.connector.double()
    return speech_llm.train()


def trained(speech_llm):
    return [value for value in speech_llm.parameters() if value.requires_grad]


class Plain:
    """A step in a single process, as a textbook has it."""

    @staticmethod
    def evaluate(speech_llm, batch):
        if speech_llm.loss.uses_teacher:
            return data.plain_loss(speech_llm, batch)
        decoder, frames, total = speech_llm.decoder, speech_llm.encode(batch), 0
        for microbatch in batch.microbatches:
            hidden = decoder.hidden(speech_llm.embed(microbatch.layout, frames))
            logits = decoder.logits(hidden, microbatch.response_index)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            total = total + F.cross_entropy(logits, microbatch.targets, reduction="sum")
        return total

    @staticmethod
    def step(speech_llm, batch):
        loss = Plain.evaluate(speech_llm, batch) / batch.num_targets
        if loss.requires_grad:
            loss.backward()
        for value in trained(speech_llm):  # a step without frames has a gradient too: zero
            value.grad = torch.zeros_like(value) if value.grad is None else value.grad
        return loss.detach()

    @staticmethod
    def clip(parameters):
        return torch.nn.utils.clip_grad_norm_(parameters, CLIP)


class Parallel:
    """A step as the training step of the model does it."""

    @staticmethod
    def evaluate(speech_llm, batch):
        from nemo_mtbi.parallel import groups

        return groups.data_parallel_sum(speech_llm.evaluate_step(batch).loss)

    @staticmethod
    def step(speech_llm, batch):
        from nemo_mtbi.parallel import groups
        from nemo_mtbi.parallel.gradients import sum_gradients

        count = groups.data_parallel_sum(torch.tensor(float(batch.num_targets)))
        loss = groups.data_parallel_sum(speech_llm.train_step(batch, int(count)).loss)
        sum_gradients(trained(speech_llm))
        return loss

    @staticmethod
    def clip(parameters):
        from nemo_mtbi.parallel.gradients import clip_gradients, gradient_norm

        norm = gradient_norm(parameters, torch.device("cpu"))
        clip_gradients(parameters, norm, CLIP)
        return norm


def train(speech_llm, batches, how):
    """Losses and norms of all steps, gradients of the first, weights and validation loss after the last."""
    parameters = trained(speech_llm)
    optimizer = torch.optim.AdamW(parameters, 1e-2) if parameters else None
    found = {"losses": [], "norms": []}
    for batch in batches:
        for value in parameters:
            value.grad = None
        found["losses"].append(how.step(speech_llm, batch).item())
        if parameters and "gradients" not in found:
            found["gradients"] = flat(value.grad for value in parameters)
        found["norms"].append(how.clip(parameters).item())
        if optimizer:
            optimizer.step()
    found["evaluation"] = [how.evaluate(speech_llm, batches[-1]).item()]
    return {**found, "weights": flat(parameters)} if parameters else found


def flat(tensors):
    return torch.cat([value.detach().reshape(-1) for value in tensors]).tolist()


def fit(speech_llm, batches, folder):
    """What :func:`train` finds, by Lightning, with the training step of the model."""
    from lightning.pytorch import Callback, Trainer
    from omegaconf import OmegaConf

    from nemo_mtbi.data.passes import Passes
    from nemo_mtbi.models.mtbi_model import MTBIModel
    from nemo_mtbi.parallel import groups
    from nemo_mtbi.parallel.replica import ReplicaLoader
    from nemo_mtbi.parallel.strategy import MTBIStrategy

    class Steps(Passes, list):
        """A loader of one pass."""

        dataset = property(lambda self: None)
        sampler = property(lambda self: self)

        def __init__(self, batches):
            super().__init__()
            self.extend(batches)

    class Recorder(Callback):
        def on_after_backward(self, runner, module):
            if module.trained and "gradients" not in found:
                found["gradients"] = flat(value.grad for value in module.trained)

        def on_train_batch_end(self, runner, module, outputs, *unused):
            found["losses"].append(outputs["loss"].item())

    found, layout = {"losses": []}, groups.layout()
    runner = Trainer(
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
        **dict(accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), use_distributed_sampler=False),
        **dict(max_steps=len(batches), num_sanity_val_steps=0, limit_val_batches=0, gradient_clip_val=CLIP),
        strategy=MTBIStrategy(layout),
        callbacks=[Recorder()],
    )
    section = {"pretrained_asr": f"{folder}/asr.nemo", "pretrained_llm": f"{folder}/untied"}
    section |= {"connector": {"hidden_size": 24}, "optim": {"name": "adamw", "lr": 1e-2}, **asdict(layout)}
    model = MTBIModel(OmegaConf.create(section), runner)
    model.speech_llm = speech_llm  # that one is float32
    model._train_dl = ReplicaLoader(Steps(batches) if groups.is_reader() else None)
    runner.fit(model)
    return {**found, "weights": flat(model.trained)} if model.trained else found


# ---------------------------------------------------------------------------------------------------------- reference


def references(cases):
    """What the reference of some cases holds: names of data, model and type."""
    return sorted({(case.data, model, case.dtype) for case in cases for model in case.models})


def make_reference(folder, keys):
    """Worker: the models, and what a single process makes of them for some of :func:`references`, as JSON."""
    from nemo_mtbi.parallel import groups
    from nemo_mtbi.testing import tiny_asr_nemo, tiny_text_llm

    groups.initialize()
    for name, (changes, *_) in MODELS.items():
        if not Path(folder, name).exists():
            tiny_text_llm(f"{folder}/{name}", num_layers=4, **changes)
    if not Path(folder, "asr.nemo").exists():
        tiny_asr_nemo(f"{folder}/asr.nemo")
    for key in json.loads(keys):
        speech_llm = build(folder, key[1], getattr(torch, key[2]))
        speech_llm.loss = data.LOSSES.get(key[0], speech_llm.loss)
        found = train(speech_llm, data.step_batches(speech_llm.frame_counter, key[0]), Plain)
        reference_file(folder, *key).write_text(json.dumps(found))


def reference_file(folder, *key):
    return Path(folder, f"{'.'.join(key)}.json")


def read_reference(folder, *key):
    return json.loads(reference_file(folder, *key).read_text())


# ---------------------------------------------------------------------------------------------------------- layouts


def warm_up():
    """Worker: the slow imports, so that a job's time is its own."""
    import nemo_mtbi.models.mtbi_model  # noqa: F401


def run_layout(folder, name, cases):
    """Worker: trains all cases under a layout; writes how far each is from a single process, one line each."""
    from nemo_mtbi.parallel import groups

    layout, data_size = LAYOUTS[name]
    groups.initialize(layout, TIMEOUT)
    assert groups.data_parallel_size() == data_size
    with open(f"{folder}/{name}.{torch.distributed.get_rank()}.jsonl", "w") as file:
        for case in cases.split(","):
            figures = [run_case(folder, layout, CASES[case], model) for model in CASES[case].models]
            print(json.dumps([case, figures]), file=file, flush=True)


def run_case(folder, layout, case, model):
    """Relative errors of everything that this process knows; with recomputation, how often its attention ran too."""
    from nemo_mtbi.parallel import groups
    from nemo_mtbi.parallel.gradients import share_parameters
    from nemo_mtbi.speech_llm.layout_decoder import fill_schedule

    rank, replica = torch.distributed.get_rank(), groups.data_parallel_rank()
    # each process draws a connector of its own; the first one's must reach all
    speech_llm = build(folder, model, getattr(torch, case.dtype), case.recompute, seed=3 + rank)
    assert all(value.dtype != torch.bfloat16 for value in trained(speech_llm))
    speech_llm.loss = data.LOSSES.get(case.data, speech_llm.loss)
    batches = data.step_batches(speech_llm.frame_counter, case.data, replica, groups.data_parallel_size())
    if not groups.is_first_stage():
        for batch in batches:
            batch.audio = batch.audio[:, :0]  # only those that encode get it
    calls, layers = count_attention(speech_llm)
    if case.trainer:
        found = fit(speech_llm, batches, folder)
    else:
        share_parameters(trained(speech_llm))
        found = train(speech_llm, batches, Parallel)
    expected = read_reference(folder, case.data, model, case.dtype)
    assert ("weights" in found) == groups.is_first_stage()
    errors = {key: error(found[key], expected[key]) for key in found}
    if case.recompute:
        passes = [len(fill_schedule(batch.microbatches, layout)) for batch in batches]
        errors["forwards"] = (len(calls) / layers - passes[-1]) / sum(passes)  # without that of the evaluation
    return errors


def count_attention(speech_llm):
    """A list that grows with each forward of an attention, and the number of attentions."""
    calls, layers = [], [layer for chunk in speech_llm.chunks for layer in chunk.decoder.layers]
    for layer in layers:
        layer.self_attention.core_attention.register_forward_hook(lambda *unused: calls.append(1))
    return calls, len(layers)


def error(found, expected):
    found, expected = (torch.tensor(values, dtype=torch.float64) for values in (found, expected))
    return ((found - expected).norm() / expected.norm()).item()
