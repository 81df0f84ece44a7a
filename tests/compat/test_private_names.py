# SPDX-License-Identifier: Apache-2.0
"""Private names of other packages: those that ``nemo_mtbi/compat`` uses are there, and the rest uses none."""

import ast
import importlib
import inspect
import pkgutil
import re
import sys
import textwrap
from functools import cache
from pathlib import Path

import pytest
import torch

import nemo_mtbi
from nemo_mtbi.compat import megatron_cpu
from nemo_mtbi.compat import nemo as compat_nemo

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(nemo_mtbi.__file__).parent
COMPAT = PACKAGE / "compat"

OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"
DDP = "megatron.core.distributed:DistributedDataParallel"
RANDOM = "megatron.core.tensor_parallel.random"
CHECKPOINT = "megatron.core.dist_checkpointing.strategies.torch"
MODEL = "nemo.core.classes:ModelPT"
CONNECTOR = "nemo.core.connectors.save_restore_connector:SaveRestoreConnector"
SUBSAMPLING = "nemo.collections.asr.parts.submodules.subsampling:ConvSubsampling"
LOOP = "lightning.pytorch.loops.training_epoch_loop:_TrainingEpochLoop"
FIT_LOOP = "lightning.pytorch.loops.fit_loop:_FitLoop"

# ``module:name``, with the arguments that are given to a function, and what it is needed for.
NAMES = [
    ("ctypes:CDLL._handle", "unloading espeak"),
    ("_ctypes:FreeLibrary" if sys.platform == "win32" else "_ctypes:dlclose", "unloading espeak"),
    ("hydra._internal.utils:get_args_parser()", "--help without NeMo"),
    ("lhotse:AudioSource.load_audio(self)", "no commands in manifests"),
    (f"{LOOP}._should_accumulate(self)", "steps that are left out"),
    (f"{LOOP}._batches_that_stepped", "step of the loggers in a resumed run"),
    (f"{LOOP}.batch_progress", "pass that a checkpoint is in"),
    ("lightning.pytorch.loops.progress:_BatchProgress.is_last_batch", "pass that a checkpoint is in"),
    (f"{FIT_LOOP}.epoch_loop", "the two above"),
    (f"{FIT_LOOP}.epoch_progress", "number of the pass in a resumed run"),
    ("lightning.pytorch.loops.progress:_ProcessedTracker.processed", "number of the pass in a resumed run"),
    ("lightning.pytorch.loops.progress:_ProcessedTracker.completed", "number of the pass in a resumed run"),
    (f"{FIT_LOOP}.min_epochs", "end after a signal"),
    ("lightning.pytorch.utilities.exceptions:_TunerExitException", "end by a time limit"),
    ("megatron.core.models.gpt:GPTModel._postprocess(self, hidden_states)", "forward to the hidden states"),
    (
        "megatron.core.models.common.embeddings.rotary_pos_embedding:RotaryEmbedding._apply_scaling"
        "(freqs, factor, low_freq_factor, high_freq_factor, original_max_position_embeddings)",
        "Llama 3.1",
    ),
    (f"{OPTIMIZER}.model_param_group_index_map", "shards of the optimizer's states"),
    (f"{OPTIMIZER}._get_model_param_range_map(param)", "shards of the optimizer's states"),
    (f"{DDP}.grad_accs", "memory after a fit"),
    (f"{DDP}.params_with_grad", "memory after a fit"),
    (f"{CHECKPOINT}:MCoreSavePlanner(dedup_replicated_tensors, flatten_state_dict)", "checkpoints"),
    (f"{CHECKPOINT}:MCoreLoadPlanner()", "checkpoints"),
    (f"{CHECKPOINT}:mcore_to_pyt_state_dict(state_dict, is_loading)", "checkpoints"),
    (f"{RANDOM}:_get_cuda_rng_state", "no CUDA"),
    (f"{RANDOM}:_set_cuda_rng_state", "no CUDA"),
    (f"{RANDOM}:get_cuda_rng_tracker", "no CUDA"),
    ("megatron.core.tensor_parallel:get_cuda_rng_tracker", "no CUDA"),
    ("megatron.core.tensor_parallel.layers:get_cuda_rng_tracker", "no CUDA"),
    ("megatron.core.pipeline_parallel.schedules:torch", "no CUDA"),
    ("megatron.core.optimizer.optimizer:torch", "no CUDA"),
    (f"{MODEL}._update_dataset_config(self, dataset_name, config)", "configuration of the loaders"),
    (f"{MODEL}._train_dl", "training loader"),
    (f"{MODEL}._validation_dl", "validation loader"),
    (f"{MODEL}._optimizer_param_groups", "what the optimizer trains"),
    (f"{MODEL}._save_restore_connector", "how a model is saved"),
    ("nemo.core.classes.common:Serialization._cfg", "configuration of a stored encoder"),
    (f"{CONNECTOR}._save_state_dict_to_disk(state_dict, filepath)", "weights without pickles"),
    (f"{CONNECTOR}._load_state_dict_from_disk(model_weights, map_location)", "weights without pickles"),
    (f"{CONNECTOR}._inject_model_parallel_rank_for_ckpt(self, dirname, basename)", "one file for every layout"),
    ("nemo.utils.callbacks.dist_ckpt_io:AsyncFinalizableCheckpointIO.async_calls_queue", "saves in the background"),
    *(
        (f"{SUBSAMPLING}.{name}", "number of frames")
        for name in ("_sampling_num", "_kernel_size", "_stride", "_left_padding", "_right_padding", "_ceil_mode")
    ),
    (f"{SUBSAMPLING}._conv_channels", "memory of a plan"),
    (f"{SUBSAMPLING}._feat_in", "memory of a plan"),
    ("torch._subclasses.fake_tensor:FakeTensorMode()", "modules without memory"),
    ("torch:UntypedStorage._cdata", "tensors that share memory"),
    ("torch.distributed:ProcessGroup._allgather_base", "torch before 2.13"),
    ("torch.distributed:ProcessGroup._reduce_scatter_base", "torch before 2.13"),
    ("torch.distributed.checkpoint:FileSystemReader.fs", "checked checkpoints"),
    ("torch.distributed.checkpoint:FileSystemWriter.fs", "hashed checkpoints"),
    ("torch.distributed.checkpoint.filesystem:_StorageInfo", "metadata of checkpoints"),
    ("torch.distributed.checkpoint.metadata:_MEM_FORMAT_ENCODING", "metadata of checkpoints"),
    ("torch.serialization:_get_layout(name)", "metadata of checkpoints"),
    ("transformers:PreTrainedModel._from_config(config)", "encoders without weights"),
]
# Names that are there in some installations only: of Transformer Engine, of NeMo 3, of Python 3.13. Beside them stands
# what shows that they still mean the same.
OPTIONAL = {
    "te_general_gemm": ("megatron.core.transformer.moe.moe_utils", "if te_general_gemm is not None"),
    "ALLOWED_TARGET_PREFIXES": ("nemo.core.classes.common", "target"),
    "_local": ("pathlib", "PosixPath"),
}
# Undocumented names without an underscore, which a search for private names would not find.
INTERNAL = {
    *("fit_loop", "epoch_loop", "te_general_gemm", "ALLOWED_TARGET_PREFIXES", "model_param_group_index_map"),
    *("grad_accs", "params_with_grad", "MCoreSavePlanner", "MCoreLoadPlanner", "mcore_to_pyt_state_dict"),
}
# Names with an underscore that are documented all the same.
PUBLIC = {"_replace": "of a namedtuple", "_exit": "of the module os"}


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name.strip("_") != ""


def last_name(entry):
    return re.fullmatch(r".*[:.](\w+)(\(.*\))?", entry)[1]


def trees(*folders, leave_out=None):
    """The code of all files in folders of the repository."""
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths if leave_out not in path.parents}


# --- what compat uses -----------------------------------------------------------------------------------------------


@cache
def assigned_in(cls):
    """Names of attributes that the methods of a class itself assign to ``self``."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError):  # written in C, or made by a function
        return frozenset()
    stored = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store))
    return frozenset(node.attr for node in stored if getattr(node.value, "id", "") == "self")


@pytest.mark.parametrize(("entry", "reason"), NAMES, ids=[entry for entry, _ in NAMES])
def test_a_private_name_is_there(entry, reason):
    module, path, given = re.fullmatch(r"([\w.]+):([\w.]+)(?:\((.*)\))?", entry).groups()
    assert reason
    owner = importlib.import_module(module)
    *owners, name = path.split(".")
    for part in owners:
        owner = getattr(owner, part)
    if not hasattr(owner, name):
        assert inspect.isclass(owner) and given is None, f"{entry} is gone: {reason}"
        assert any(name in assigned_in(base) for base in owner.__mro__), f"no object has {entry} any more: {reason}"
        return
    if given is not None:
        taken = inspect.signature(getattr(owner, name)).parameters.values()
        wanted = [argument for argument in given.split(", ") if argument]
        assert set(wanted) <= {one.name for one in taken} or any(one.kind is one.VAR_KEYWORD for one in taken)
        required = {one.name for one in taken if one.default is one.empty and one.kind <= one.POSITIONAL_OR_KEYWORD}
        if name != "_postprocess":  # Megatron calls it; ours takes what there is
            assert required <= {"self", *wanted}


@pytest.mark.parametrize("name", OPTIONAL)
def test_an_optional_name_means_the_same(name):
    module, text = OPTIONAL[name]
    assert text in inspect.getsource(importlib.import_module(module))


def test_the_table_is_that_of_compat():
    used = {name for tree in trees(COMPAT).values() for name in foreign_names(tree, set())}
    used |= {part for tree in trees(COMPAT).values() for part in private_constants(tree)}
    own = {"_MARK", "_RENAMED", "_NoStream", "_NoRngTracker", "_CpuTorch", "_obeys_nemo_mtbi"}
    listed = {last_name(entry) for entry, _ in NAMES} | OPTIONAL.keys()
    assert {name for name in used - own if is_private(name)} - {"_subclasses", "_internal", "_ctypes"} <= listed
    source = "\n".join(path.read_text(encoding="utf-8") for path in COMPAT.glob("*.py"))
    assert [name for name in sorted(listed | INTERNAL) if not re.search(rf"\b{name}\b", source)] == []


def private_constants(tree):
    """Private names in strings, dotted or not, without docstrings."""
    strings = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return {part for text in strings if re.fullmatch(r"[\w.]+", text) for part in text.split(".") if is_private(part)}


def test_restoring_is_what_nemo_calls_so():
    from nemo.core.classes import ModelPT
    from nemo.utils import AppState

    AppState().nemo_file_folder = "somewhere"
    try:
        compat_nemo.set_restoring(True)
        assert ModelPT._is_model_being_restored() is compat_nemo.is_restoring() is True
        assert AppState().nemo_file_folder is None
        ModelPT._set_model_restore_state(is_being_restored=False)
        assert compat_nemo.is_restoring() is False
    finally:
        compat_nemo.set_restoring(False)


def test_every_name_of_cuda_is_restored_after_an_error():
    before = torch.Tensor.cuda, torch.Tensor.type, torch.cuda.current_device
    with pytest.raises(KeyError), megatron_cpu.cuda_names_replaced(), megatron_cpu.optimizer_names_replaced():
        assert torch.cuda.current_device() == torch.device("cpu")
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        raise KeyError
    assert before == (torch.Tensor.cuda, torch.Tensor.type, torch.cuda.current_device)


# --- what the rest uses ---------------------------------------------------------------------------------------------


def own_names(*parsed):
    """Names that code defines: functions, classes, variables, and attributes of ``self``."""
    names = set()
    for node in (node for tree in parsed for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names |= {node.attr} if getattr(node.value, "id", "") == "self" else set()
    return names


def foreign_names(tree, own):
    """Yield private and internal names of other packages in code: attributes, imports, and names given as text."""
    for node in ast.walk(tree):
        found = []
        if isinstance(node, ast.Attribute):
            found = [node.attr]
        elif isinstance(node, ast.Import):
            found = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("nemo_mtbi"):
            found = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in ACCESSORS:
            found = [one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        yield from (name for name in found if (is_private(name) and name not in own) or name in INTERNAL)


ACCESSORS = {"getattr", "setattr", "hasattr", "delattr", "pop", "object", "attrgetter"}


def replaced_names(tree):
    """Yield assignments to attributes of what was imported from other packages, and the means to patch them."""
    imported = set()
    for node in ast.walk(tree):
        names = node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        module = node.module if isinstance(node, ast.ImportFrom) else None
        for alias in names:
            package = (module or alias.name).split(".")[0]
            if package == "unittest":
                yield ast.unparse(node)
            if package not in sys.stdlib_module_names and package != "nemo_mtbi":
                imported.add((alias.asname or alias.name).split(".")[0])
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            root = node.value
            while isinstance(root, (ast.Attribute, ast.Subscript)):
                root = root.value
            if isinstance(root, ast.Name) and root.id in imported:
                yield ast.unparse(node)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("loop._should_accumulate = None", "_should_accumulate"),
        ("from lightning.pytorch.utilities.exceptions import _TunerExitException", "_TunerExitException"),
        ("from torch._subclasses.fake_tensor import FakeTensorMode", "_subclasses"),
        ("def f():\n    import torch._dynamo", "_dynamo"),
        ("getattr(model, '_trainer')", "_trainer"),
        ("vars(loop).pop('_should_accumulate', None)", "_should_accumulate"),
        ("trainer.fit_loop.min_epochs = 0", "fit_loop"),
    ],
)
def test_every_way_to_a_private_name_is_seen(source, name):
    assert name in foreign_names(ast.parse(source), set())


@pytest.mark.parametrize("source", ["self._own = 1\nother._own", "os.path.join(__file__)", "from __future__ import x"])
def test_own_and_public_names_are_not_private(source):
    tree = ast.parse(source)
    assert list(foreign_names(tree, own_names(tree))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.cuda.synchronize = None",
        "from lhotse import AudioSource\nAudioSource.load_audio = None",
        "from unittest import mock",
    ],
)
def test_every_replacement_is_seen(source):
    assert list(replaced_names(ast.parse(source)))


def test_only_compat_uses_private_names_of_other_packages():
    parsed = trees(PACKAGE, "scripts", "examples", leave_out=COMPAT)
    own = own_names(*parsed.values()) | PUBLIC.keys()
    found = {path: {*foreign_names(tree, own), *replaced_names(tree)} for path, tree in parsed.items()}
    assert {str(path): sorted(names) for path, names in found.items() if names} == {}


def private_names_of_bases(cls):
    """Private names that the bases of a class have which other packages define."""
    bases = [base for base in cls.__mro__[1:-1] if not base.__module__.startswith("nemo_mtbi.")]
    names = set().union(*map(vars, bases), *map(assigned_in, bases))
    return {name for name in names if is_private(name)}


def inherited_names_used(cls):
    """Private names of bases in other packages that a class defines or reads: by accident, they would clash."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return (used | own_names(tree)) & private_names_of_bases(cls)


def test_an_inherited_name_is_seen():
    from nemo_mtbi.compat.megatron_gpt import HiddenStatesGPT
    from nemo_mtbi.compat.nemo_connector import WeightFileConnector

    assert inherited_names_used(HiddenStatesGPT) == {"_postprocess"}
    assert "_save_state_dict_to_disk" in inherited_names_used(WeightFileConnector)


@pytest.mark.slow
def test_no_class_outside_compat_uses_private_names_of_its_bases():
    found = {}
    for info in pkgutil.walk_packages(nemo_mtbi.__path__, "nemo_mtbi."):
        if info.name.startswith("nemo_mtbi.compat"):
            continue
        for name, cls in vars(importlib.import_module(info.name)).items():
            if inspect.isclass(cls) and cls.__module__ == info.name and (used := inherited_names_used(cls)):
                found[f"{info.name}.{name}"] = sorted(used)
    assert found == {}
